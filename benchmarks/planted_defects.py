"""Kernels with a known defect each, for `benchmarks.sanitize`: what a tool misses here, it would miss elsewhere too.

`python -m benchmarks.planted_defects NAME` runs one on the CUDA device, compute capability 9.0. They are launched as
Pagewire's kernels are.
"""

from __future__ import annotations

import sys

import torch

from kernels import compile as kernel_compile

NAME = "planted_defect"
THREADS = 128
COPY = "copy_async_16(shared + 4 * i, in + 4 * i, true);"
OTHERS = "out[i] = shared[(4 * i + 128) % 512];"
_BOX = f"""
            __shared__ u64 landed;
            if (i == 0) {{{{
              barrier_init(&landed, 1);
              barriers_initialised();
              barrier_arrive_expecting(&landed, 16 * {THREADS});
            }}}}
            {{sync}}
            if (i == 0 && {{who}})
              asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes{{to}} "
                           "[%0], [%1], %2, [%3]{{mask}};" ::"r"(shared_address(shared)), "l"(in),
                           "r"(16 * {THREADS}), "r"(shared_address(&landed)){{ctas}}
                           : "memory");
            out[i] = shared[i];
            barrier_wait(&landed, 0);
            {{sync}}"""
DEFECTS: dict[str, dict[str, str]] = {
    "memcheck": {
        "a store behind a tensor": "out[i + 1] = in[i];",
        "an asynchronous copy from behind a tensor": """
            copy_async_16(shared + 4 * i, in + 4 * (i + 1), true);
            copy_async_commit();
            copy_async_wait<0>();
            out[i] = shared[4 * i];""",
    },
    "racecheck": {
        "no barrier between a store and a load": "shared[i] = in[i]; out[i] = shared[(i + 32) % 128];",
        "no barrier after an asynchronous copy": f"{COPY} copy_async_commit(); copy_async_wait<0>(); {OTHERS}",
        "an mbarrier that does not wait for copies": f"""
            __shared__ u64 ready;
            if (i == 0) barrier_init(&ready, {THREADS});
            __syncthreads();
            {COPY}
            barrier_arrive(&ready);
            barrier_wait(&ready, 0);
            {OTHERS}""",
        "a store into what wgmma still reads": f"""
            for (int k = i; k < (64 + 128) * 128 / 4; k += {THREADS}) shared[k] = 0.0f;
            fence_async_proxy();
            __syncthreads();
            float d[16][4];
            wgmma_fence();
            wgmma<bfloat16, 128>(d, k_major_operand(shared), k_major_operand(shared + 64 * 128 / 4), 0);
            wgmma_commit();
            shared[i] = in[i];
            wgmma_wait<0>();
            keep_order(d);
            out[i] = d[0][0] + d[15][3];""",
        "no barrier of a cluster after a store into another CTA": """
            cluster_sync();
            u32 there;
            asm("mapa.shared::cluster.u32 %0, %1, %2;"
                : "=r"(there) : "r"(shared_address(shared + i)), "r"(1 - cluster_rank()));
            asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(in[i]) : "memory");
            out[i] = shared[(i + 32) % 128];
            cluster_sync();""",
        "a box that is read before it has landed": _BOX.format(
            sync="__syncthreads();", who="1", to="", mask="", ctas=""
        ),
        "a box from another CTA that is read before it has landed": _BOX.format(
            sync="cluster_sync();",
            who="cluster_rank() == 0",
            to=".multicast::cluster",
            mask=", %4",
            ctas=', "h"((unsigned short)3)',
        ),
    },
    "synccheck": {
        "a barrier that only some threads of a warp reach": "if (i < 40) __syncthreads(); out[i] = in[i];",
        "an mbarrier that nobody has initialised": "__shared__ u64 ready; barrier_arrive(&ready); out[i] = in[i];",
    },
}
"""Body of the kernel, by tool and name: `i` is the thread; out [THREADS] and in [4 * THREADS] are float32."""


def ctas(body: str) -> int:
    """How many of them run the body: a cluster of two, if it has to do with one."""
    return 2 if "cluster_rank" in body else 1


def source(body: str) -> str:
    """The text of a kernel with this body."""
    cluster = f"__cluster_dims__({ctas(body)}, 1, 1) " if ctas(body) > 1 else ""
    return f"""{kernel_compile.source("hopper.cuh", {})}
extern "C" __global__ void {cluster}__launch_bounds__({THREADS}) {NAME}(float* out, const float* in) {{
  SHARED_MEMORY(dynamic);
  float* shared = (float*)(dynamic + (1024 - shared_address(dynamic) % 1024) % 1024);
  const int i = threadIdx.x;
  {body}
}}
"""


def main() -> None:
    """Launches the one that is named, once."""
    body = next(bodies[sys.argv[1]] for bodies in DEFECTS.values() if sys.argv[1] in bodies)
    text = source(body)
    device = torch.device("cuda", 0)
    loaded = kernel_compile.CupyBackend().load(text, NAME, device)
    kernel = kernel_compile.Kernel(loaded, kernel_compile.parameters(text, NAME))
    out, given = torch.zeros(THREADS, device=device), torch.ones(4 * THREADS, device=device)
    kernel((ctas(body), 1, 1), THREADS, 1024 + (64 + 128) * 128, out.data_ptr(), given.data_ptr())
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
