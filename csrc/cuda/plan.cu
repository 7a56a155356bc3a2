// plan: a stable counting sort in three launches. Atomics on integers only, whose sums have no order.
#include "common.cuh"
#include "plan.cuh"

namespace moemm::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;

__device__ inline int64_t block_end(const PlanArguments& a) {
  const int64_t end = (static_cast<int64_t>(blockIdx.x) + 1) * kPlanSlots;
  return end < a.num_slots ? end : a.num_slots;
}

// Slots of each expert within each block's range.
template <typename index_t>
__global__ void histogram_kernel(PlanArguments a) {
  extern __shared__ int32_t histogram[];
  for (int e = threadIdx.x; e < a.num_experts; e += kThreads) histogram[e] = 0;
  __syncthreads();
  const int64_t end = block_end(a);
  for (int64_t slot = static_cast<int64_t>(blockIdx.x) * kPlanSlots + threadIdx.x; slot < end; slot += kThreads) {
    const int64_t expert = static_cast<const index_t*>(a.experts)[slot];
    if (!in_range(expert, a.num_experts)) trap_bad_index("experts", slot, expert, a.num_experts);
    if (expert != kNone) atomicAdd(&histogram[expert], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < a.num_experts; e += kThreads) {
    a.histograms[static_cast<int64_t>(blockIdx.x) * a.num_experts + e] = histogram[e];
  }
}

// Sum of the lanes below this one; `total` becomes that of all lanes.
template <typename value_t>
__device__ inline value_t warp_exclusive(value_t value, value_t& total) {
  const int lane = threadIdx.x % kWarp;
  value_t sum = value;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const value_t other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  total = __shfl_sync(0xffffffffu, sum, kWarp - 1);
  return sum - value;
}

// One warp an expert: its slots in earlier blocks, in place, and its count.
__global__ void scan_kernel(PlanArguments a, int64_t num_blocks) {
  const int64_t expert = blockIdx.x;
  int64_t before = 0;
  for (int64_t start = 0; start < num_blocks; start += kWarp) {
    const int64_t block = start + threadIdx.x;
    int64_t* entry = a.histograms + block * a.num_experts + expert;
    int64_t total;
    const int64_t sum = warp_exclusive<int64_t>(block < num_blocks ? *entry : 0, total);
    if (block < num_blocks) *entry = before + sum;
    before += total;
  }
  if (threadIdx.x == 0) a.counts[expert] = before;
}

// first[e]: the first row of expert e for this block. The first warp sums the aligned counts up.
__device__ inline void first_rows(const PlanArguments& a, int64_t num_blocks, int64_t* first) {
  if (threadIdx.x < kWarp) {
    int64_t before = 0;
    for (int64_t start = 0; start < a.num_experts; start += kWarp) {
      const int64_t e = start + threadIdx.x;
      int64_t total;
      const int64_t count = e < a.num_experts ? a.counts[e] : 0;
      const int64_t needed = (count + a.alignment - 1) / a.alignment * a.alignment;
      const int64_t row = before + warp_exclusive<int64_t>(needed, total);
      if (e < a.num_experts) {
        const int64_t own = num_blocks == 0 ? 0 : a.histograms[blockIdx.x * a.num_experts + e];
        first[e] = row + own;
        if (blockIdx.x == 0) a.offsets[e] = row;
      }
      before += total;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) a.offsets[a.num_experts] = before;
  }
  __syncthreads();
}

// Tiles of kThreads slots, one after another: a slot's row is the first free one of its expert, plus its rank in the tile.
template <typename index_t>
__global__ void scatter_kernel(PlanArguments a, int64_t num_blocks) {
  extern __shared__ int64_t first[];
  int32_t* warp_counts = reinterpret_cast<int32_t*>(first + a.num_experts);  // (warps, E)
  first_rows(a, num_blocks, first);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t end = block_end(a);
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kPlanSlots; tile < end; tile += kThreads) {
    for (int i = threadIdx.x; i < kWarps * a.num_experts; i += kThreads) warp_counts[i] = 0;
    __syncthreads();
    const int64_t slot = tile + threadIdx.x;
    const int expert = slot < end ? static_cast<int>(static_cast<const index_t*>(a.experts)[slot]) : -1;
    const unsigned same = __match_any_sync(0xffffffffu, expert);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (expert >= 0 && rank == 0) warp_counts[warp * a.num_experts + expert] = __popc(same);
    __syncthreads();
    int64_t row = kNone;
    if (expert >= 0) {
      row = first[expert] + rank;
      for (int other = 0; other < warp; ++other) row += warp_counts[other * a.num_experts + expert];
      static_cast<index_t*>(a.order)[row] = static_cast<index_t>(slot);
    }
    if (slot < end) static_cast<index_t*>(a.inverse)[slot] = static_cast<index_t>(row);
    __syncthreads();
    for (int e = threadIdx.x; e < a.num_experts; e += kThreads) {
      for (int other = 0; other < kWarps; ++other) first[e] += warp_counts[other * a.num_experts + e];
    }
    __syncthreads();
  }
}

template <typename index_t>
void launch(const PlanArguments& a, cudaStream_t stream) {
  const int64_t num_blocks = (a.num_slots + kPlanSlots - 1) / kPlanSlots;
  const unsigned blocks = static_cast<unsigned>(num_blocks), experts = static_cast<unsigned>(a.num_experts);
  if (num_blocks > 0) histogram_kernel<index_t><<<blocks, kThreads, experts * sizeof(int32_t), stream>>>(a);
  scan_kernel<<<experts, kWarp, 0, stream>>>(a, num_blocks);
  const size_t shared = experts * (sizeof(int64_t) + kWarps * sizeof(int32_t));
  scatter_kernel<index_t><<<blocks > 0 ? blocks : 1, kThreads, shared, stream>>>(a, num_blocks);
}

}  // namespace

cudaError_t launch_plan(const PlanArguments& a, cudaStream_t stream) {
  const int64_t bytes = a.num_rows * (a.index == Index::kInt32 ? 4 : 8);
  if (bytes > 0) {  // rows of no slot hold kNone: all bits set
    const cudaError_t status = cudaMemsetAsync(a.order, 0xff, bytes, stream);
    if (status != cudaSuccess) return status;
  }
  a.index == Index::kInt32 ? launch<int32_t>(a, stream) : launch<int64_t>(a, stream);
  return cudaGetLastError();
}

}  // namespace moemm::cuda
