// As much of CUDA as csrc/cuda uses, for a CPU: device.cpp runs every thread of a cluster as a fiber of its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct float2 {
  float x, y;
};
struct double2 {
  double x, y;
};

// ------------------------------------------------------------------------------------ what a thread sees

namespace on_cpu {

const dim3& thread_index();
const dim3& block_index();
void block_barrier();
bool block_any(bool own);
double of_lane(double own, int lane);
int least_of_warp(int own);

}  // namespace on_cpu

#define threadIdx (on_cpu::thread_index())
#define blockIdx (on_cpu::block_index())

inline void __syncthreads() { on_cpu::block_barrier(); }
inline int __syncthreads_or(int own) { return on_cpu::block_any(own); }
inline double __shfl_xor_sync(unsigned, double own, int apart) {
  return on_cpu::of_lane(own, static_cast<int>(threadIdx.x % 32) ^ apart);
}
inline int __reduce_min_sync(unsigned, int own) { return on_cpu::least_of_warp(own); }

// ------------------------------------------------------------------------------------ what the host sees

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorIllegalAddress = 700, cudaErrorLaunchTimeout = 702 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* found, Kernel*, const cudaLaunchConfig_t* config) {
  *found = 132 / config->attrs->val.clusterDim.x;
  return cudaSuccess;
}

namespace on_cpu {

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

}  // namespace on_cpu

template <typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments...),
                               const std::type_identity_t<Arguments>&... arguments) {
  return on_cpu::launch(*config, [&] { kernel(arguments...); });
}
