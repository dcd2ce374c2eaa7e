// Words that one warp of each block of a cluster sends to all the blocks, itself included.
//
// A sender writes into the receivers' shared memory and tells their barriers how many bytes came,
// so nobody waits for more than the words it reads: no barrier of the whole cluster, and no memory
// barrier, which would wait for every store on its way.
//
// A box and the slots that its words go to may be used again once a block knows, by what it got
// since, that all blocks have read them. A block may leave when it has got all that is sent to it.
#pragma once

#include <cstdint>

#include "csrc/ptx.cuh"
#include "csrc/ranks.cuh"

namespace twilight {

// Counts the bytes that come for one exchange after the other. In shared memory.
struct Mailbox {
  uint64_t barrier;

  // By one thread, before the cluster's blocks have all started; announce() after the last one.
  __device__ void open() {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier))
                 : "memory");
#endif
  }
  __device__ static void announce() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  // By one thread, once an exchange.
  __device__ void expect(unsigned bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
        "r"(bytes)
        : "memory");
#endif
  }
  // Until all that exchange number `round` brings is there. It is in shared memory: a wait of the
  // cluster's scope would drop the L1 cache as well.
  __device__ void wait(unsigned round) {
#if __CUDA_ARCH__ >= 900
    unsigned done = 0;
    while (!done) {
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(done)
          : "r"(shared_address(&barrier)), "r"(round & 1)
          : "memory");
    }
#endif
  }
  // Sends a word to where `to` is in block `rank`.
  __device__ void send(uint64_t* to, int rank, uint64_t word) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n\t.reg .b32 to, box;\n\t"
        "mapa.shared::cluster.u32 to, %0, %2;\n\t"
        "mapa.shared::cluster.u32 box, %1, %2;\n\t"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u64 [to], %3, [box];\n\t}" ::"r"(
            shared_address(to)),
        "r"(shared_address(&barrier)), "r"(rank), "l"(word)
        : "memory");
#endif
  }
};

}  // namespace twilight
