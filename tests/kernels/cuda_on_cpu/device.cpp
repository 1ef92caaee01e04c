// A device whose threads take turns: each runs until it waits for others, and who is next is up to `order`. So a barrier
// that is missing shows: with one order or another a thread reads what nobody has written yet, or what is written again.
// Memory of a block holds NaN until it is written, is not written beyond its end, and is there for other blocks only
// while the block runs.

#include <setjmp.h>
#include <ucontext.h>

#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cooperative_groups.h"

namespace on_cpu {
namespace {

constexpr int WARP = 32;
constexpr size_t STACK = 1 << 15, GUARD = 64;
constexpr unsigned char UNWRITTEN = 0xff;  // NaN in float and double

struct Barrier {
  int members, arrived = 0;
  unsigned passed = 0;
};

struct Warp {
  Barrier barrier{WARP};
  double doubles[2][WARP];
  int ints[2][WARP];
};

struct Block {
  dim3 index;
  Barrier barrier;
  int begun = 0, ended = 0;
  bool any = false;
  std::vector<unsigned char> memory;
  std::vector<Warp> warps;
};

struct Thread {
  dim3 index;
  Block* block;
  Warp* warp;
  int exchanges = 0, met = 0, met_in_block = 0;
  Barrier* waits = nullptr;
  unsigned seen = 0;
  bool begun = false, ended = false;
  jmp_buf place;
  ucontext_t start;
};

int order = 0;  // 0: the first block and thread first; 1: the last; else shuffled, from this seed on
int skipped = -1, skipped_in_block = -1;  // barriers that are left out, by how many a thread has come to before
bool wild;                                // memory was asked for that is not there

std::vector<Block> blocks;
std::vector<Thread> threads;
std::vector<std::unique_ptr<char[]>> stacks;
Barrier cluster{0};
Thread* current;
jmp_buf scheduler;
ucontext_t unused;
const std::function<void()>* body;

void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.passed;
    return;
  }
  current->waits = &barrier;
  current->seen = barrier.passed;
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

void begin() {
  ++current->block->begun;
  (*body)();
  ++current->block->ended;
  current->ended = true;
  _longjmp(scheduler, 1);
}

void resume(Thread& thread) {
  current = &thread;
  if (_setjmp(scheduler)) return;
  if (thread.begun) _longjmp(thread.place, 1);
  thread.begun = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = stacks[&thread - threads.data()].get();
  thread.start.uc_stack.ss_size = STACK;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, begin, 0);
  swapcontext(&unused, &thread.start);
}

// Runs a thread until it waits; false where it waits already, or has ended.
bool go_on(Thread& thread) {
  if (thread.ended || (thread.waits && thread.waits->passed == thread.seen)) return false;
  thread.waits = nullptr;
  resume(thread);
  return true;
}

// All threads of one cluster to their end; an error where they wait for each other for ever.
cudaError_t run_cluster(const cudaLaunchConfig_t& config, int first, int count, std::mt19937& random) {
  const int size = config.blockDim.x;
  blocks.clear();
  blocks.resize(count);
  threads.clear();
  threads.resize(count * size);
  cluster = Barrier{count * size};
  while (stacks.size() < threads.size()) stacks.emplace_back(new char[STACK]);
  for (int b = 0; b < count; ++b) {
    blocks[b].index = dim3(first + b);
    blocks[b].barrier = Barrier{size};
    blocks[b].memory.assign(config.dynamicSmemBytes + GUARD, UNWRITTEN);
    blocks[b].warps.resize(size / WARP);
    for (int t = 0; t < size; ++t) {
      Thread& thread = threads[b * size + t];
      thread.index = dim3(t);
      thread.block = &blocks[b];
      thread.warp = &blocks[b].warps[t / WARP];
    }
  }
  // Blocks one after the other, each until none of its threads can go on; or threads of all blocks in any order.
  std::vector<int> turns(threads.size());
  for (size_t i = 0; i < turns.size(); ++i) turns[i] = order == 1 ? turns.size() - 1 - i : i;
  const size_t together = order > 1 ? turns.size() : size;
  unsigned round = 0;
  for (bool moved = true; moved;) {
    moved = false;
    if (order > 1 && round++ % 16 == 0) std::shuffle(turns.begin(), turns.end(), random);
    for (size_t from = 0; from < turns.size(); from += together)
      for (bool once_more = true; once_more;) {
        once_more = false;
        for (size_t i = from; i < from + together; ++i) once_more |= go_on(threads[turns[i]]);
        moved |= once_more;
      }
  }
  for (const Thread& thread : threads)
    if (!thread.ended) return cudaErrorLaunchTimeout;
  for (const Block& block : blocks)
    for (size_t i = config.dynamicSmemBytes; i < block.memory.size(); ++i) wild |= block.memory[i] != UNWRITTEN;
  return wild ? cudaErrorIllegalAddress : cudaSuccess;
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const int count = config.attrs->val.clusterDim.x;
  if (config.gridDim.x % count || config.blockDim.x % WARP) return cudaErrorInvalidValue;
  std::mt19937 random(order);
  body = &kernel;
  wild = false;
  for (unsigned first = 0; first < config.gridDim.x; first += count)
    if (const cudaError_t error = run_cluster(config, first, count, random)) return error;
  return cudaSuccess;
}

const dim3& thread_index() { return current->index; }
const dim3& block_index() { return current->block->index; }
int cluster_blocks() { return blocks.size(); }
int cluster_rank() { return current->block - blocks.data(); }
void cluster_barrier() {
  if (current->met++ != skipped) wait(cluster);
}
void block_barrier() {
  if (current->met_in_block++ != skipped_in_block) wait(current->block->barrier);
}

bool block_any(bool own) {
  if (current->met_in_block++ == skipped_in_block) return own;
  Block& block = *current->block;
  block.any = false;
  wait(block.barrier);
  block.any |= own;
  wait(block.barrier);
  const bool any = block.any;
  wait(block.barrier);
  return any;
}

// Two rows of numbers by turns: nobody writes to one before all have read it.
double of_lane(double own, int lane) {
  double* row = current->warp->doubles[current->exchanges++ % 2];
  row[current->index.x % WARP] = own;
  wait(current->warp->barrier);
  return row[lane];
}

int least_of_warp(int own) {
  int* row = current->warp->ints[current->exchanges++ % 2];
  row[current->index.x % WARP] = own;
  wait(current->warp->barrier);
  return *std::min_element(row, row + WARP);
}

void* of_block(void* own, int rank) {
  const auto offset = static_cast<unsigned char*>(own) - current->block->memory.data();
  wild |= offset < 0 || offset >= static_cast<ptrdiff_t>(current->block->memory.size() - GUARD);
  wild |= rank < 0 || rank >= cluster_blocks();
  if (wild) return own;
  Block& block = blocks[rank];
  wild |= !block.begun || block.ended == block.barrier.members;
  return block.memory.data() + offset;
}

}  // namespace on_cpu

namespace clipfast {

char* shared_memory() { return reinterpret_cast<char*>(on_cpu::current->block->memory.data()); }

}  // namespace clipfast

extern "C" void on_cpu_order(int order) { on_cpu::order = order; }
extern "C" void on_cpu_skip(int of_cluster, int of_block) {
  on_cpu::skipped = of_cluster;
  on_cpu::skipped_in_block = of_block;
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchTimeout) return "threads wait for each other";
  return error == cudaErrorIllegalAddress ? "memory that is not there" : "another error";
}
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int values[] = {9, 0, 227 * 1024};
  return *value = values[attribute], cudaSuccess;
}
