// combine: residual plus a gather-sum over a token's rows, in the order of k, and its backward pass. No atomics, no
// synchronisation.
#include "combine.cuh"
#include "common.cuh"

namespace moemm::cuda {
namespace {

template <typename scalar_t, typename index_t, int count>
__global__ void combine_kernel(CombineArguments a) {
  using acc_t = Accumulator<scalar_t>;
  using pack_t = Pack<scalar_t, count>;
  const auto* y = static_cast<const scalar_t*>(a.y);
  const auto* inverse = static_cast<const index_t*>(a.inverse);
  const auto* gates = static_cast<const acc_t*>(a.gates);
  const auto* residual = static_cast<const scalar_t*>(a.residual);
  for (int64_t token = first_row(); token < a.num_tokens; token += row_step()) {
    for (int64_t column = threadIdx.x * count; column < a.width; column += blockDim.x * count) {
      acc_t sums[count] = {};
      if (residual != nullptr) {
        const auto values = *reinterpret_cast<const pack_t*>(residual + token * a.residual_stride + column);
#pragma unroll
        for (int i = 0; i < count; ++i) sums[i] = widen(values.item[i]);
      }
#pragma unroll 4
      for (int64_t k = 0; k < a.slots_per_token; ++k) {
        const int64_t slot = token * a.slots_per_token + k, row = inverse[slot];
        if (!in_range(row, a.num_rows)) trap_bad_index("inverse", slot, row, a.num_rows);
        if (row == kNone) continue;
        const acc_t gate = gates == nullptr ? acc_t(1) : gates[slot];
        const auto values = *reinterpret_cast<const pack_t*>(y + row * a.y_stride + column);
#pragma unroll
        for (int i = 0; i < count; ++i) sums[i] += gate * widen(values.item[i]);
      }
      pack_t result;
#pragma unroll
      for (int i = 0; i < count; ++i) result.item[i] = narrow<scalar_t>(sums[i]);
      *reinterpret_cast<pack_t*>(static_cast<scalar_t*>(a.out) + token * a.width + column) = result;
    }
  }
}

// One warp a slot: dy[row] = gate * grad[token], dgate = <grad[token], y[row]>. Rows of dy that no slot names stay
// unwritten and unmarked.
template <typename scalar_t, typename index_t, int count>
__global__ void combine_backward_kernel(CombineBackwardArguments a) {
  using acc_t = Accumulator<scalar_t>;
  using pack_t = Pack<scalar_t, count>;
  const auto* inverse = static_cast<const index_t*>(a.inverse);
  for (int64_t slot = first_row(); slot < a.num_tokens * a.slots_per_token; slot += row_step()) {
    const int64_t row = inverse[slot];
    if (!in_range(row, a.num_rows)) trap_bad_index("inverse", slot, row, a.num_rows);
    acc_t total = 0;
    if (row != kNone) {
      const acc_t gate = static_cast<const acc_t*>(a.gates)[slot];
      const auto* grad = static_cast<const scalar_t*>(a.grad) + slot / a.slots_per_token * a.grad_stride;
      const auto* y = static_cast<const scalar_t*>(a.y) + row * a.y_stride;
      auto* dy = static_cast<scalar_t*>(a.dy) + row * a.width;
      for (int64_t column = threadIdx.x * count; column < a.width; column += kWarp * count) {
        const auto grads = *reinterpret_cast<const pack_t*>(grad + column);
        const auto values = *reinterpret_cast<const pack_t*>(y + column);
        pack_t result;
#pragma unroll
        for (int i = 0; i < count; ++i) {
          const acc_t wide = widen(grads.item[i]);
          total += wide * widen(values.item[i]);
          result.item[i] = narrow<scalar_t>(gate * wide);
        }
        *reinterpret_cast<pack_t*>(dy + column) = result;
      }
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) total += __shfl_down_sync(0xffffffffu, total, offset);
    if (threadIdx.x == 0) {
      static_cast<acc_t*>(a.dgates)[slot] = total;
      if (row != kNone) a.marked[row] = 1;
    }
  }
}

template <typename scalar_t, int count>
__global__ void zero_unmarked_kernel(CombineBackwardArguments a) {
  for (int64_t row = first_row(); row < a.num_rows; row += row_step()) {
    if (a.marked[row]) continue;
    auto* dy = static_cast<scalar_t*>(a.dy) + row * a.width;
    for (int64_t column = threadIdx.x * count; column < a.width; column += blockDim.x * count) {
      *reinterpret_cast<Pack<scalar_t, count>*>(dy + column) = {};
    }
  }
}

template <typename scalar_t, typename index_t, int count>
void launch(const CombineArguments& a, cudaStream_t stream) {
  const RowGrid grid(a.num_tokens, a.width / count);
  combine_kernel<scalar_t, index_t, count><<<grid.blocks, grid.threads, 0, stream>>>(a);
}

template <typename scalar_t, typename index_t, int count>
void launch(const CombineBackwardArguments& a, cudaStream_t stream) {
  constexpr int64_t kWarps = kThreads / kWarp, kMaxBlocks = 0x7fffffff;
  const int64_t needed = (a.num_tokens * a.slots_per_token + kWarps - 1) / kWarps;
  const dim3 blocks(static_cast<unsigned>(needed < kMaxBlocks ? needed : kMaxBlocks));
  if (needed > 0) {
    combine_backward_kernel<scalar_t, index_t, count><<<blocks, dim3(kWarp, kWarps), 0, stream>>>(a);
  }
  const RowGrid rows(a.num_rows, a.width / count);
  zero_unmarked_kernel<scalar_t, count><<<rows.blocks, rows.threads, 0, stream>>>(a);
}

template <typename scalar_t, typename Arguments>
void by_index(const Arguments& a, bool wide, cudaStream_t stream) {
  constexpr int kCount = kAccessBytes / sizeof(scalar_t);
  if (a.index == Index::kInt32) {
    wide ? launch<scalar_t, int32_t, kCount>(a, stream) : launch<scalar_t, int32_t, 1>(a, stream);
  } else {
    wide ? launch<scalar_t, int64_t, kCount>(a, stream) : launch<scalar_t, int64_t, 1>(a, stream);
  }
}

template <typename Arguments>
cudaError_t by_element(const Arguments& a, bool wide, cudaStream_t stream) {
  switch (a.element) {
    case Element::kFloat:
      by_index<float>(a, wide, stream);
      break;
    case Element::kDouble:
      by_index<double>(a, wide, stream);
      break;
    case Element::kBFloat16:
      by_index<__nv_bfloat16>(a, wide, stream);
      break;
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_combine(const CombineArguments& a, cudaStream_t stream) {
  if (a.num_tokens == 0 || a.width == 0) return cudaSuccess;
  const int64_t bytes = bytes_of(a.element);
  const bool wide = aligned({a.y, a.residual, a.out}, {a.y_stride * bytes, a.residual_stride * bytes, a.width * bytes});
  return by_element(a, wide, stream);
}

cudaError_t launch_combine_backward(const CombineBackwardArguments& a, cudaStream_t stream) {
  const int64_t bytes = bytes_of(a.element), num_slots = a.num_tokens * a.slots_per_token;
  if (a.num_rows == 0 || a.width == 0) {  // then every slot is empty, or every sum is
    const int64_t gate_bytes = a.element == Element::kDouble ? 8 : 4;
    return num_slots == 0 ? cudaSuccess : cudaMemsetAsync(a.dgates, 0, num_slots * gate_bytes, stream);
  }
  const cudaError_t status = cudaMemsetAsync(a.marked, 0, a.num_rows, stream);
  if (status != cudaSuccess) return status;
  const bool wide = aligned({a.grad, a.y, a.dy}, {a.grad_stride * bytes, a.y_stride * bytes, a.width * bytes});
  return by_element(a, wide, stream);
}

}  // namespace moemm::cuda
