// TEXTSPAN of a head by a cluster of blocks on neighbouring multiprocessors, whose shared memory has all its texts.
//
// As in csrc/span_kernel.h text t explains v_t, and a pick with direction w, u = P S w and q = w·u changes that to
//
//     v_t − s_t (2 x_t − s_t q) / n,    s_t = A_t·w,  x_t = A_t·u,  n = w·w  (w and u are not scaled to length 1 here)
//
// A step reads every text, so its time depends on where the texts are: a head's 0.9 MB are loaded once, each block keeps
// its share, and only results go to global memory until the head is done. The small matrices P (the projection away from
// what was picked) and P S P are divided among the blocks by rows and updated in place. A step has three barriers of the
// cluster: for the warps' best texts, for P A_j, and for w = P P A_j (projected twice, which is exact to rounding) with
// u = P S P A_j.
//
// Everything except the texts in memory is float64. All blocks and warps reduce the same values in the same order, so
// they agree, to the bit, on what was picked and on when to end.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

namespace clipfast {

constexpr int WARP = 32, WARPS = 8, THREADS = WARP * WARPS;
constexpr int COLUMNS = 8;       // of the factor that are processed together
constexpr int NOWHERE = INT32_MAX;
constexpr unsigned ALL_LANES = 0xffffffff;
// Variances that differ by less than this share of the first pick's count as equal (clipfast/kernels/reference.py says why).
constexpr double SPAN_EQUAL = 4e-15;

template <typename Stored>
struct Span {
  const Stored* texts;  // [heads, count, rank], strides in elements
  int64_t head_stride, text_stride, rank_stride;
  const double* factor;  // [heads, rank, rank], L with the covariance L Lᵀ
  int count, rank, steps, size;
  double floor;
  int64_t* picks;      // [heads, size], filled with −1 before
  Stored* variance;    // [heads, size], filled with 0 before
  Stored* directions;  // [heads, size, rank], filled with 0 before
};

// The shared memory of a block: offsets in bytes.
struct Layout {
  int share;  // texts of a block, even
  int rows;   // of each matrix
  int64_t texts, left, away, covariance, text, once, peaks, places, bytes;

  __host__ __device__ Layout(int stored, int count, int rank, int blocks) {
    share = ((count + blocks - 1) / blocks + 1) / 2 * 2;
    rows = (rank + blocks - 1) / blocks;
    const int64_t matrix = int64_t{8} * rows * rank;
    texts = int64_t{16} * rank;  // after the pairs (w, u)
    left = texts + int64_t{stored} * rank * share;
    away = left + int64_t{8} * share;
    covariance = away + matrix;
    text = covariance + matrix;
    once = text + int64_t{8} * rank;
    peaks = once + int64_t{8} * rank;
    places = peaks + int64_t{8} * blocks * WARPS;
    bytes = places + int64_t{4} * blocks * WARPS;
  }
};

template <typename Stored>
struct Two;
template <>
struct Two<float> {
  using type = float2;
};
template <>
struct Two<double> {
  using type = double2;
};

__device__ inline double warp_sum(double x) {
  for (int apart = WARP / 2; apart; apart /= 2) x += __shfl_xor_sync(ALL_LANES, x, apart);
  return x;
}

__device__ inline double warp_most(double x) {
  for (int apart = WARP / 2; apart; apart /= 2) x = fmax(x, __shfl_xor_sync(ALL_LANES, x, apart));
  return x;
}

// One block's part of a head. Only meet() waits for other blocks; all blocks of the cluster pass it together. Loops that
// neither read texts nor wait for memory are not unrolled: with 80 registers per thread three blocks share a
// multiprocessor, and one computes while another waits.
template <typename Stored>
class Head {
 public:
  __device__ Head(const Span<Stored>& span, char* memory)
      : span(span), cluster(cooperative_groups::this_cluster()), blocks(cluster.num_blocks()),
        block(cluster.block_rank()), warp(threadIdx.x / WARP), lane(threadIdx.x % WARP), rank(span.rank),
        layout(sizeof(Stored), span.count, rank, blocks) {
    pair = reinterpret_cast<double2*>(memory);
    texts = reinterpret_cast<Stored*>(memory + layout.texts);
    left = reinterpret_cast<double*>(memory + layout.left);
    away = reinterpret_cast<double*>(memory + layout.away);
    covariance = reinterpret_cast<double*>(memory + layout.covariance);
    text = reinterpret_cast<double*>(memory + layout.text);
    once = reinterpret_cast<double*>(memory + layout.once);
    peaks = reinterpret_cast<double*>(memory + layout.peaks);
    places = reinterpret_cast<int*>(memory + layout.places);
    first_text = block * layout.share;
    first_row = block * layout.rows;
    own_rows = max(0, min(layout.rows, rank - first_row));
  }

  __device__ void pursue() {
    const int64_t head = blockIdx.x / blocks;
    const double* factor = span.factor + head * rank * rank;
    load_texts(span.texts + head * span.head_stride);
    load_matrices(factor);
    const bool lower = !__syncthreads_or(above_diagonal(factor));  // also waits for the texts
    first_variances(factor, lower);
    meet();  // every block has started: others may write to its shared memory
    best_of_block(0);
    double first = 0, limit = span.floor * DBL_MIN;
    for (int step = 0;; ++step) {
      meet();
      const double best = best_of_cluster();
      if (!(best > limit) || best == INFINITY) return;  // nothing is picked where variances overflowed
      if (step == 0) {
        first = best;
        limit = span.floor * fmax(first, DBL_MIN);
      }
      const int pick = first_of_cluster(best - SPAN_EQUAL * first);
      fetch_text(pick);
      __syncthreads();
      multiply_once();
      meet();
      multiply_twice();
      meet();
      double length = 0, q = 0;
#pragma unroll 4
      for (int r = lane; r < rank; r += WARP) {
        length += pair[r].x * pair[r].x;
        q += pair[r].x * pair[r].y;
      }
      length = warp_sum(length);
      q = warp_sum(q);
      if (!(length >= DBL_MIN && length < INFINITY)) return;
      if (block == 0) write(head * span.size + step, pick, best, 1 / sqrt(length));
      if (step + 1 == span.steps) return;
      update_matrices(1 / length, q / length);
      update_variances(1 / length, q / length, SPAN_EQUAL * first);
    }
  }

 private:
  const Span<Stored>& span;
  const cooperative_groups::cluster_group cluster;
  const int blocks, block, warp, lane, rank;
  const Layout layout;
  double2* pair;  // [rank], w and u
  Stored* texts;  // [rank, share]
  double *left, *away, *covariance, *text, *once, *peaks;
  int* places;
  int first_text, first_row, own_rows;

  __device__ void meet() { cluster.sync(); }

  template <typename T>
  __device__ T* of_block(T* own, int other) {
    return cluster.map_shared_rank(own, other);
  }

  // This block's share of the texts, zeros beyond the last; neighbouring threads read neighbouring addresses.
  __device__ void load_texts(const Stored* from) {
    const bool by_text = span.text_stride <= span.rank_stride;
    const int rows = by_text ? rank : layout.share, columns = by_text ? layout.share : rank;
#pragma unroll 1
    for (int row = warp; row < rows; row += WARPS) {
#pragma unroll 8
      for (int column = lane; column < columns; column += WARP) {
        const int t = by_text ? column : row, r = by_text ? row : column;
        const bool real = first_text + t < span.count;
        texts[r * layout.share + t] =
            real ? from[(first_text + t) * span.text_stride + r * span.rank_stride] : static_cast<Stored>(0);
      }
    }
  }

  // Rows of P = I and of S = L Lᵀ.
  __device__ void load_matrices(const double* factor) {
#pragma unroll 1
    for (int i = threadIdx.x; i < own_rows * rank; i += THREADS) {
      const int row = first_row + i / rank, column = i % rank;
      double sum = 0;
      for (int k = 0; k < rank; ++k) sum += factor[row * rank + k] * factor[column * rank + k];
      covariance[i] = sum;
      away[i] = row == column;
    }
  }

  __device__ int above_diagonal(const double* factor) {
    int is_any_nonzero = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < rank * rank; i += THREADS) is_any_nonzero |= i % rank > i / rank && factor[i] != 0;
    return is_any_nonzero;
  }

  // v_t = ‖A_t L‖²; −∞ beyond the last text; ∞ instead of NaN, which ends the head. The zeros that columns of a triangular
  // L start with are skipped.
  __device__ void first_variances(const double* factor, bool lower) {
    for (int t = 2 * threadIdx.x; t < layout.share; t += 2 * THREADS) {
      double one = 0, other = 0;
      for (int column = 0; column < rank; column += COLUMNS) {
        double ones[COLUMNS] = {}, others[COLUMNS] = {};
        for (int r = lower ? column : 0; r < rank; ++r) {
          const auto two = two_texts(r, t);
          const double x = two.x, y = two.y;
#pragma unroll
          for (int k = 0; k < COLUMNS; ++k) {
            const double entry = column + k < rank ? factor[r * rank + column + k] : 0;
            ones[k] += x * entry;
            others[k] += y * entry;
          }
        }
#pragma unroll
        for (int k = 0; k < COLUMNS; ++k) {
          one += ones[k] * ones[k];
          other += others[k] * others[k];
        }
      }
      left[t] = first_text + t >= span.count ? -INFINITY : one < INFINITY ? one : INFINITY;
      left[t + 1] = first_text + t + 1 >= span.count ? -INFINITY : other < INFINITY ? other : INFINITY;
    }
  }

  __device__ auto two_texts(int r, int t) {
    return *reinterpret_cast<const typename Two<Stored>::type*>(texts + r * layout.share + t);
  }

  // v ← v − s (2 x − s q / n) / n, then the largest of them.
  __device__ void update_variances(double inverse, double ratio, double slack) {
    for (int t = 2 * threadIdx.x; t < layout.share; t += 2 * THREADS) {
      double s = 0, x = 0, other_s = 0, other_x = 0;
#pragma unroll 4
      for (int r = 0; r < rank; ++r) {
        const double2 both = pair[r];
        const auto two = two_texts(r, t);
        s += two.x * both.x;
        x += two.x * both.y;
        other_s += two.y * both.x;
        other_x += two.y * both.y;
      }
      left[t] -= s * inverse * (2 * x - s * ratio);
      left[t + 1] -= other_s * inverse * (2 * other_x - other_s * ratio);
    }
    best_of_block(slack);
  }

  // Sends to all blocks: the largest variance of each warp's texts, and the first text that is within `slack` of it.
  __device__ void best_of_block(double slack) {
    double best = -INFINITY;
    int place = NOWHERE;
    for (int t = 2 * threadIdx.x; t < layout.share; t += 2 * THREADS)
      for (int k = 0; k < 2; ++k)
        if (left[t + k] > best + slack) {
          best = left[t + k];
          place = first_text + t + k;
        }
    const double most = warp_most(best);
    const int where = __reduce_min_sync(ALL_LANES, best >= most - slack ? place : NOWHERE);
    if (lane < blocks) {
      of_block(peaks, lane)[block * WARPS + warp] = most;
      of_block(places, lane)[block * WARPS + warp] = where;
    }
  }

  __device__ double best_of_cluster() const {
    double best = -INFINITY;
#pragma unroll 4
    for (int i = lane; i < blocks * WARPS; i += WARP) best = fmax(best, peaks[i]);
    return warp_most(best);
  }

  // The first text, of those that the warps sent, whose variance is at least `least`.
  __device__ int first_of_cluster(double least) const {
    int place = NOWHERE;
#pragma unroll 4
    for (int i = lane; i < blocks * WARPS; i += WARP)
      if (peaks[i] >= least) place = min(place, places[i]);
    return __reduce_min_sync(ALL_LANES, place);
  }

  // Fetches the picked text from its block; it is not picked again.
  __device__ void fetch_text(int pick) {
    const int owner = pick / layout.share, t = pick % layout.share;
    const Stored* from = of_block(texts, owner) + t;
#pragma unroll 1
    for (int r = threadIdx.x; r < rank; r += THREADS) text[r] = from[r * layout.share];
    if (owner == block && threadIdx.x == 0) left[t] = -INFINITY;
  }

  __device__ double row_times(const double* matrix, int row, const double* x) {
    double sum = 0;
#pragma unroll 4
    for (int r = lane; r < rank; r += WARP) sum += matrix[row * rank + r] * x[r];
    return warp_sum(sum);
  }

  // P A_j: this block computes its rows and sends them to all blocks.
  __device__ void multiply_once() {
#pragma unroll 1
    for (int row = warp; row < own_rows; row += WARPS) {
      const double x = row_times(away, row, text);
      if (lane < blocks) of_block(once, lane)[first_row + row] = x;
    }
  }

  // w = P P A_j and u = P S P A_j, in the same way.
  __device__ void multiply_twice() {
#pragma unroll 1
    for (int row = warp; row < own_rows; row += WARPS) {
      const double2 both = {row_times(away, row, once), row_times(covariance, row, once)};
      if (lane < blocks) of_block(pair, lane)[first_row + row] = both;
    }
  }

  // P ← P − w wᵀ / n and S ← S − (w uᵀ + u wᵀ − w wᵀ q / n) / n.
  __device__ void update_matrices(double inverse, double ratio) {
#pragma unroll 1
    for (int i = threadIdx.x; i < own_rows * rank; i += THREADS) {
      const double2 row = pair[first_row + i / rank], column = pair[i % rank];
      const double square = row.x * column.x;
      away[i] -= square * inverse;
      covariance[i] -= (row.x * column.y + row.y * column.x - square * ratio) * inverse;
    }
  }

  __device__ void write(int64_t place, int pick, double best, double scale) {
#pragma unroll 1
    for (int r = threadIdx.x; r < rank; r += THREADS)
      span.directions[place * rank + r] = static_cast<Stored>(pair[r].x * scale);
    if (threadIdx.x == 0) {
      span.picks[place] = pick;
      span.variance[place] = static_cast<Stored>(best);
    }
  }
};

}  // namespace clipfast
