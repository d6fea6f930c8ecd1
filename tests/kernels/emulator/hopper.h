// Compute capability 9.0 on a CPU: twins of csrc/wgmma.cuh and hopper.cuh, written from the PTX manual. What it adds to emulator.h's suspicion:
//   a wgmma computes only when waited for, its accumulators are NaN until then, and its operands in shared memory must be the same then
//   as when it was issued; a group of products needs a fence first;
//   what cp.async wrote must have passed a proxy fence before wgmma reads it;
//   copies that arrive at a barrier by themselves land when nothing else can go on;
//   descriptors are decoded bit by bit, and must start at a swizzle atom and stay inside shared memory.
#pragma once
#include "emulator.h"

namespace emulator {

struct Product {
  bool in_registers, add, computed = false;
  u64 a, b;
  int registers, issued = 0, retired = 0;
  std::vector<float> operand_a, operand_b;  // [64][16], [16][N]
  std::vector<std::vector<float>> d;        // [128][registers], in and out
  long before[128];                         // the product whose result is the input, or -1
  void (*read)(Product&);                   // fills the operands from shared memory
};
struct Warpgroup {
  std::deque<Product> products;
};
struct Issued {
  float* d;
  long product;
};
struct Thread {
  bool fenced = false;
  std::vector<Issued> open;
  std::deque<std::vector<Issued>> groups;
  long count = 0;
};
struct NamedBarrier {
  int arrived;
  unsigned generation;
};
struct Arrival {
  std::vector<Copy> copies;
  u64* barrier;
};
inline std::deque<Arrival> arrivals;
inline std::vector<int> landed_units;  // of arrivals: any thread's fence will do
inline std::vector<Warpgroup> warpgroups;
inline std::vector<Thread> threads_of_cta;
inline NamedBarrier named_barriers[16];

bool land_arrivals();
inline const bool hopper_hooks = [] {
  cta_begins = [] {
    warpgroups = std::vector<Warpgroup>(block_size.x / 128);
    threads_of_cta = std::vector<Thread>(block_size.x);
    std::memset(named_barriers, 0, sizeof named_barriers);
    arrivals.clear();
    landed_units.clear();
  };
  all_wait = [] { return land_arrivals(); };
  thread_ends = [] {
    Thread& thread = threads_of_cta[current->index.x];
    if (!thread.open.empty() || !thread.groups.empty()) failure = "a thread ended with products not committed or not waited for";
  };
  return true;
}();

inline unsigned short swizzled(u32 address) {
  address ^= (address >> 7 & 7) << 4;
  if (address + 2 > shared_bytes) fail("a matrix descriptor leads outside shared memory");
  if (unfenced[address / 16]) fail("wgmma reads what cp.async wrote without a fence.proxy.async in between");
  return element(shared_memory + address, 0);
}
inline u32 field(u64 descriptor, int bit) { return u32(descriptor >> bit & 0x3fff) * 16; }
inline void check(u64 descriptor, bool k_major) {
  if (descriptor >> 62 != 1) fail("a matrix descriptor without 128-byte swizzle");
  if (descriptor >> 46 & 0xffff) fail("a matrix descriptor with unused bits or a base offset");
  const u32 start = field(descriptor, 0);
  if (start / 128 % 8 || start % 128 > 96 || (!k_major && start % 128)) fail("a matrix descriptor that does not start at a swizzle atom");
}
template <class T>
void read_operands(Product& p) {
  const int columns = p.registers * 2;
  auto value = [](unsigned short bits) { return to_float(T{bits}); };
  if (!p.in_registers) {
    check(p.a, true);
    for (int m = 0; m < 64; ++m)
      for (int k = 0; k < 16; ++k)
        p.operand_a[m * 16 + k] = value(swizzled(field(p.a, 0) + m / 8 * field(p.a, 32) + m % 8 * 128 + k * 2));
  }
  check(p.b, !p.in_registers);
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < columns; ++n) {
      const u32 offset = p.in_registers ? n / 64 * field(p.b, 16) + n % 64 * 2 + k / 8 * field(p.b, 32) + k % 8 * 128
                                        : n / 8 * field(p.b, 32) + n % 8 * 128 + k * 2;
      p.operand_b[k * columns + n] = value(swizzled(field(p.b, 0) + offset));
    }
}

template <class T, int R>
void issue(float* d, const u32* a, u64 a_matrix, u64 b_matrix, bool add) {
  Thread& thread = threads_of_cta[current->index.x];
  auto& products = warpgroups[current->index.x / 128].products;
  if (!thread.fenced) fail("wgmma without wgmma.fence");
  const long index = thread.count++;
  if (index == long(products.size())) {
    Product p;
    p.in_registers = a != nullptr;
    p.add = add;
    p.a = a_matrix;
    p.b = b_matrix;
    p.registers = R;
    p.operand_a.resize(64 * 16);
    p.operand_b.resize(16 * 2 * R);
    p.d.assign(128, std::vector<float>(R));
    p.read = read_operands<T>;
    p.read(p);
    products.push_back(std::move(p));
  }
  Product& p = products[index];
  if (p.in_registers != (a != nullptr) || p.a != a_matrix || p.b != b_matrix || p.add != add || p.registers != R)
    fail("threads of one warpgroup issue different wgmma");
  const int rank = current->index.x % 128, row = rank / 32 * 16 + current->lane / 4, t = current->lane % 4;
  if (a != nullptr)
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j)
        p.operand_a[(row + i % 2 * 8) * 16 + i / 2 * 8 + 2 * t + j] = to_float(T{(unsigned short)(a[i] >> (16 * j))});
  p.before[rank] = -1;
  auto look = [&](const std::vector<Issued>& group) {
    for (const Issued& other : group)
      if (other.d == d) p.before[rank] = other.product;
  };
  for (auto& group : thread.groups) look(group);
  look(thread.open);
  if (p.before[rank] < 0) std::copy(d, d + R, p.d[rank].begin());
  std::fill(d, d + R, NAN);
  thread.open.push_back({d, index});
  ++p.issued;
  ++events;
}

inline void compute(std::deque<Product>& products, Product& p) {
  const std::vector<float> a = p.operand_a, b = p.operand_b;
  p.read(p);
  if (std::memcmp(a.data(), p.operand_a.data(), a.size() * 4) || std::memcmp(b.data(), p.operand_b.data(), b.size() * 4))
    fail("shared memory changed under a wgmma that was not waited for");
  const int columns = p.registers * 2;
  for (int rank = 0; rank < 128; ++rank) {
    std::vector<float>& d = p.d[rank];
    if (p.before[rank] >= 0) d = products[p.before[rank]].d[rank];
    if (!p.add) std::fill(d.begin(), d.end(), 0.0f);
    for (int i = 0; i < p.registers; ++i) {
      const int row = rank / 32 * 16 + rank % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + rank % 4 * 2 + i % 2;
      double sum = d[i];
      for (int k = 0; k < 16; ++k) sum += double(a[row * 16 + k]) * b[k * columns + column];
      d[i] = float(sum);
    }
  }
  p.computed = true;
}

inline void retire(size_t pending) {
  Thread& thread = threads_of_cta[current->index.x];
  auto& products = warpgroups[current->index.x / 128].products;
  const int rank = current->index.x % 128;
  while (thread.groups.size() > pending) {
    for (const Issued& issued : thread.groups.front()) {
      while (products[issued.product].issued < 128) yield();
      Product& p = products[issued.product];
      if (!p.computed) compute(products, p);
      std::copy(p.d[rank].begin(), p.d[rank].end(), issued.d);
    }
    const auto done = std::move(thread.groups.front());
    thread.groups.pop_front();
    for (const Issued& issued : done)
      for (const auto& group : thread.groups)
        for (const Issued& later : group)
          if (later.d == issued.d) std::fill(later.d, later.d + products[later.product].registers, NAN);
    ++events;
  }
}

struct SharedBarrier {
  unsigned short expected, missing;
  u32 phase;
};
static_assert(sizeof(SharedBarrier) == 8);
inline SharedBarrier& shared_barrier(u64* barrier) {
  if ((uintptr_t)barrier % 8 || !in_shared(barrier, 8)) fail("an mbarrier outside shared memory or unaligned");
  return *(SharedBarrier*)barrier;
}

}  // namespace emulator

inline u32 shared_address(const void* pointer) { return u32((const unsigned char*)pointer - emulator::shared_memory); }

inline void barrier_init(u64* barrier, int arrivals) {
  emulator::shared_barrier(barrier) = {(unsigned short)arrivals, (unsigned short)arrivals, 0};
}
inline void barrier_arrive(u64* barrier) {
  auto& b = emulator::shared_barrier(barrier);
  if (b.expected == 0xffff) emulator::fail("an mbarrier used before its initialisation");
  ++emulator::events;
  if (--b.missing == 0) b.missing = b.expected, ++b.phase;
}
inline void barrier_arrive_after_copies(u64* barrier) {
  emulator::shared_barrier(barrier);
  emulator::Arrival arrival{{}, barrier};
  for (auto& group : emulator::current->groups) {
    arrival.copies.insert(arrival.copies.end(), group.begin(), group.end());
    group.clear();
  }
  emulator::arrivals.push_back(std::move(arrival));
}
inline bool emulator::land_arrivals() {
  if (arrivals.empty()) return false;
  for (const Copy& copy : arrivals.front().copies) {
    land(copy);
    unfenced[unit(copy)] = true;
    landed_units.push_back(unit(copy));
  }
  barrier_arrive(arrivals.front().barrier);
  arrivals.pop_front();
  return true;
}
inline void barrier_wait(u64* barrier, u32 parity) {
  auto& b = emulator::shared_barrier(barrier);
  if (b.expected == 0xffff) emulator::fail("an mbarrier used before its initialisation");
  while ((b.phase & 1) == parity) emulator::yield();
  ++emulator::events;
}
inline void named_barrier_arrive(int id, int threads) {
  if (id < 1 || id > 15 || threads % 32) emulator::fail("named barriers are 1 to 15, of whole warps");
  auto& b = emulator::named_barriers[id];
  ++emulator::events;
  if (++b.arrived == threads) b.arrived = 0, ++b.generation;
}
inline void named_barrier_sync(int id, int threads) {
  const unsigned generation = emulator::named_barriers[id].generation;
  named_barrier_arrive(id, threads);
  while (generation == emulator::named_barriers[id].generation) emulator::yield();
}
inline void fence_async_proxy() {
  for (int unit : emulator::current->unfenced_units) emulator::unfenced[unit] = false;
  for (int unit : emulator::landed_units) emulator::unfenced[unit] = false;
  emulator::current->unfenced_units.clear();
  emulator::landed_units.clear();
}
template <int REGISTERS>
void take_registers() { static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256); }
template <int REGISTERS>
void give_registers() { static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256); }

inline void wgmma_fence() { emulator::threads_of_cta[emulator::current->index.x].fenced = true; }
inline void wgmma_commit() {
  auto& thread = emulator::threads_of_cta[emulator::current->index.x];
  thread.fenced = false;
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int PENDING>
void wgmma_wait() { emulator::retire(PENDING); }
template <int N>
void keep_order(float (&)[N][4]) {}
template <class T, int N>
void wgmma(float (&d)[N / 8][4], u64 a, u64 b, int accumulate) { emulator::issue<T, N / 2>(d[0], nullptr, a, b, accumulate != 0); }
template <class T, int N>
void wgmma(float (&d)[N / 8][4], const u32 (&a)[4], u64 b) { emulator::issue<T, N / 2>(d[0], a, 0, b, true); }
