// What a kernel of specialised warpgroups needs on Hopper (sm_90a): barriers in shared memory, barriers of some of the warps, registers that
// change hands. tests/kernels/emulator/hopper.h has the same on a CPU.
//
// A cluster is some CTAs that run at the same time and reach each other's shared memory. A box of a matrix in global memory, described by a
// TensorMap (kernels/compile.py makes them), is copied by one thread, in the 128-byte swizzle of wgmma.cuh; zeros where it leaves the matrix.
#pragma once
#include "device.cuh"
#include "wgmma.cuh"

struct alignas(64) TensorMap {
  u64 words[16];
};

#ifndef PAGEWIRE_EMULATED

DEVICE void barrier_init(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
DEVICE void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Until the phase of this parity is over; the phase before the first counts as over.
DEVICE void barrier_wait(u64* barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Arrives, and asks for that many bytes of copied boxes before the phase can be over.
DEVICE void barrier_arrive_expecting(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// At the barrier in the same place of another CTA of the cluster, or of this one.
DEVICE void barrier_arrive_at(u64* barrier, u32 cta) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(cta)
      : "memory");
}
// Boxes see the barriers that this thread has initialised, and other CTAs of the cluster do after the next cluster_sync.
DEVICE void barriers_initialised() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of the cluster.
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same, but what was written before need not be seen behind it: without the fence for that, which waits for all stores.
DEVICE void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Asks for a tensor map, well before the first of its boxes.
DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// Copies the box at these coordinates, first dimension first, and then counts its bytes at the barrier. `once` is as in copy_async_16_once, `policy` L2's.
DEVICE void copy_box_once(void* to, const TensorMap* map, u64* barrier, int a, int b, int c, int d) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(a), "r"(b), "r"(c), "r"(d), "l"(EVICT_FIRST)
      : "memory");
}
DEVICE void copy_box(void* to, const TensorMap* map, u64* barrier, int a, int b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
                   shared_address(to)),
               "l"(map), "r"(shared_address(barrier)), "r"(a), "r"(b)
               : "memory");
}
DEVICE void copy_box(void* to, const TensorMap* map, u64* barrier, int a, int b, int c, int d, int e, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e), "l"(policy)
      : "memory");
}
// The same to the same place in each CTA of the cluster whose bit is set, and counts at the barriers there.
DEVICE void copy_box_to(u32 ctas, void* to, const TensorMap* map, u64* barrier, int a, int b) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(a), "r"(b), "h"((unsigned short)ctas)
      : "memory");
}

// A warpgroup's registers a thread, a multiple of 8.
template <int REGISTERS>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#endif
