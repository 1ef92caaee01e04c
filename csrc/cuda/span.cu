#include "span_kernel.h"

#include <algorithm>
#include <type_traits>

#define CLIPFAST_EXPORT extern "C" __attribute__((visibility("default")))

namespace clipfast {

#ifdef __CUDACC__
__device__ char* shared_memory() {
  extern __shared__ double2 memory[];
  return reinterpret_cast<char*>(memory);
}
#else
char* shared_memory();  // tests run the blocks of this file on the CPU
#endif

template <typename Stored>
__global__ void __launch_bounds__(THREADS, 3) span_heads(Span<Stored> span) {
  Head<Stored>(span, shared_memory()).pursue();
}

namespace {

// The bytes of shared memory that a block can use.
cudaError_t most_shared(int device, int* bytes) {
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// A launch of `heads` clusters of `blocks` blocks.
template <typename Stored>
class Launch {
 public:
  Launch(int device, cudaStream_t stream, int count, int rank, int heads, int blocks) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = blocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(heads * blocks);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = Layout(sizeof(Stored), count, rank, blocks).bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    // These are the same for every launch, so threads of the host do not interfere.
    int most = 0;
    error = cudaSetDevice(device);  // torch has a runtime of its own, in which it is current already
    if (error == cudaSuccess) error = most_shared(device, &most);
    allow(cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    allow(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    allow(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);  // more than 8 blocks: 16 on Hopper
  }

  cudaError_t at_once(int* clusters) {
    return error == cudaSuccess ? cudaOccupancyMaxActiveClusters(clusters, span_heads<Stored>, &config) : error;
  }

  cudaError_t run(const Span<Stored>& span) {
    return error == cudaSuccess ? cudaLaunchKernelEx(&config, span_heads<Stored>, span) : error;
  }

 private:
  cudaError_t error;
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};

  void allow(cudaFuncAttribute what, int value) {
    if (error == cudaSuccess) error = cudaFuncSetAttribute(span_heads<Stored>, what, value);
  }
};

}  // namespace
}  // namespace clipfast

CLIPFAST_EXPORT const char* clipfast_cuda_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

// The compute capability of a device, 90 for 9.0; or how many devices there are, for a device of −1.
CLIPFAST_EXPORT int clipfast_cuda_capability(int device, int* result) {
  if (device < 0) return cudaGetDeviceCount(result);
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *result = 10 * major + minor;
  return error;
}

// How many heads of `count` texts the device computes at once, with clusters of `blocks` blocks: 0 where a head's texts do
// not fit their shared memory.
CLIPFAST_EXPORT int clipfast_cuda_span_clusters(int device, int is_double, int64_t count, int64_t rank, int blocks,
                                                int* clusters) {
  using namespace clipfast;
  *clusters = 0;
  if (blocks < 1) return cudaErrorInvalidValue;
  int most = 0;
  const cudaError_t error = most_shared(device, &most);
  if (error != cudaSuccess) return error;
  const int stored = is_double ? sizeof(double) : sizeof(float);
  if (count > most || rank > most || Layout(stored, count, rank, blocks).bytes > most) return cudaSuccess;
  if (is_double) return Launch<double>(device, nullptr, count, rank, 1, blocks).at_once(clusters);
  return Launch<float>(device, nullptr, count, rank, 1, blocks).at_once(clusters);
}

// TEXTSPAN of `heads` heads, as span in csrc/span.cpp: pointers are the device's, results filled with −1 and 0
// before. `blocks` is a number that clipfast_cuda_span_clusters accepts.
CLIPFAST_EXPORT int clipfast_cuda_span(int device, void* stream, int is_double, const void* texts, int64_t head_stride,
                                       int64_t text_stride, int64_t rank_stride, const double* factor, int64_t heads,
                                       int64_t count, int64_t rank, int64_t size, double floor, int64_t* picks,
                                       void* variance, void* directions, int blocks) {
  using namespace clipfast;
  if (blocks < 1) return cudaErrorInvalidValue;
  const auto compute = [&](auto* stored) -> cudaError_t {
    using Stored = std::remove_pointer_t<decltype(stored)>;
    const Span<Stored> span = {static_cast<const Stored*>(texts),
                               head_stride,
                               text_stride,
                               rank_stride,
                               factor,
                               static_cast<int>(count),
                               static_cast<int>(rank),
                               static_cast<int>(std::min(size, rank)),
                               static_cast<int>(size),
                               floor,
                               picks,
                               static_cast<Stored*>(variance),
                               static_cast<Stored*>(directions)};
    return Launch<Stored>(device, static_cast<cudaStream_t>(stream), count, rank, heads, blocks).run(span);
  };
  return is_double ? compute(static_cast<double*>(nullptr)) : compute(static_cast<float*>(nullptr));
}
