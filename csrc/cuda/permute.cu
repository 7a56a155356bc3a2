// permute: rows of x in the order of a plan, one pass, as plain bytes.
#include "common.cuh"
#include "permute.cuh"

namespace moemm::cuda {
namespace {

// unit_t: what one thread moves, 16 bytes where alignment allows.
template <typename unit_t, typename index_t>
__global__ void permute_kernel(PermuteArguments a) {
  const int64_t units = a.row_bytes / static_cast<int64_t>(sizeof(unit_t));
  for (int64_t row = first_row(); row < a.num_rows; row += row_step()) {
    const int64_t slot = static_cast<const index_t*>(a.order)[row];
    if (!in_range(slot, a.num_slots)) trap_bad_index("order", row, slot, a.num_slots);
    auto* to = reinterpret_cast<unit_t*>(static_cast<char*>(a.out) + row * a.row_bytes);
    if (slot == kNone) {
      for (int64_t i = threadIdx.x; i < units; i += blockDim.x) to[i] = unit_t{};
    } else {
      const char* token = static_cast<const char*>(a.x) + slot / a.slots_per_token * a.x_stride;
      const auto* from = reinterpret_cast<const unit_t*>(token);
      for (int64_t i = threadIdx.x; i < units; i += blockDim.x) to[i] = from[i];
    }
  }
}

template <typename unit_t>
void launch(const PermuteArguments& a, cudaStream_t stream) {
  const RowGrid grid(a.num_rows, a.row_bytes / static_cast<int64_t>(sizeof(unit_t)));
  if (a.index == Index::kInt32) {
    permute_kernel<unit_t, int32_t><<<grid.blocks, grid.threads, 0, stream>>>(a);
  } else {
    permute_kernel<unit_t, int64_t><<<grid.blocks, grid.threads, 0, stream>>>(a);
  }
}

}  // namespace

cudaError_t launch_permute(const PermuteArguments& a, cudaStream_t stream) {
  if (a.num_rows == 0 || a.row_bytes == 0) return cudaSuccess;
  if (aligned({a.x, a.out}, {a.x_stride, a.row_bytes})) {
    launch<uint4>(a, stream);
  } else if (a.element_bytes == 8) {
    launch<uint64_t>(a, stream);
  } else if (a.element_bytes == 4) {
    launch<uint32_t>(a, stream);
  } else {
    launch<uint16_t>(a, stream);
  }
  return cudaGetLastError();
}

}  // namespace moemm::cuda
