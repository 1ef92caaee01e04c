// The cluster, as csrc/cuda uses it; see cuda_runtime.h beside this.
#pragma once

#include "cuda_runtime.h"

namespace on_cpu {

int cluster_blocks();
int cluster_rank();
void cluster_barrier();
void* of_block(void* own, int rank);

}  // namespace on_cpu

namespace cooperative_groups {

struct cluster_group {
  int num_blocks() const { return on_cpu::cluster_blocks(); }
  int block_rank() const { return on_cpu::cluster_rank(); }
  void sync() const { on_cpu::cluster_barrier(); }
  template <typename T>
  T* map_shared_rank(T* own, int rank) const {
    return static_cast<T*>(on_cpu::of_block(own, rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
