// The experts' networks: tiles of rows in one parallel region, single-threaded products inside.
#include "experts.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "moemm/checks.h"
#include "moemm/types.h"
#include "phases.h"

namespace moemm::cpu {
namespace {

constexpr int64_t kTileRows = 256;      // rows of one product in the forward pass and for dx
constexpr int64_t kWaveRows = 1024;     // rows a thread whose intermediates the backward pass holds at a time
constexpr int64_t kWeightBlock = 1024;  // rows of a weight's gradient that one task makes

// Tiles of the experts from `begin` to `end`. In a task, `begin` and `rows` are aligned rows, padding included.
Phase row_tasks(const Experts& experts, const Rows& rows, int64_t begin, int64_t end) {
  Phase tasks;
  for (int64_t e = begin; e < end; ++e) {
    const int64_t total = aligned(rows.count[e]);
    for (int64_t at = 0; at < total; at += kTileRows) {
      const int64_t size = std::min(kTileRows, total - at);
      tasks.push_back({e, rows.first[e] + at, size, size * experts.w1[e].size(0)});
    }
  }
  return tasks;
}

// Rows [begin, begin + count) of the aligned layout, taken from x; zeros for padding.
template <typename scalar_t>
void gather(at::Tensor& to, const at::Tensor& x, const Rows& rows, int64_t begin, int64_t count) {
  const int64_t width = x.size(1), stride = x.stride(0);
  auto* out = to.mutable_data_ptr<scalar_t>();
  const auto* from = x.const_data_ptr<scalar_t>();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t source = rows.source[begin + i];
    if (source == kNone) {
      std::fill_n(out + i * width, width, scalar_t(0));
    } else {
      std::memcpy(out + i * width, from + source * stride, width * sizeof(scalar_t));
    }
  }
}

template <typename scalar_t>
void add_bias(at::Tensor& rows, const at::Tensor& bias) {
  using acc_t = Accumulator<scalar_t>;
  const auto* add = bias.const_data_ptr<scalar_t>();
  for (int64_t row = 0; row < rows.size(0); ++row) {
    auto* to = rows.mutable_data_ptr<scalar_t>() + row * rows.stride(0);
    for (int64_t i = 0; i < bias.size(0); ++i) store(to[i], acc_t(widen(to[i])) + acc_t(widen(add[i])));
  }
}

template <typename Body>
void by_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::kGelu:
      return body.template operator()<Activation::kGelu>();
    case Activation::kRelu2:
      return body.template operator()<Activation::kRelu2>();
    case Activation::kSwiglu:
      return body.template operator()<Activation::kSwiglu>();
  }
}

template <typename scalar_t>
void activate_rows(Activation activation, at::Tensor& h, const at::Tensor& z) {
  by_activation(activation, [&]<Activation kind>() {
    for (int64_t row = 0; row < h.size(0); ++row) {
      activate<kind, scalar_t>(h.mutable_data_ptr<scalar_t>() + row * h.stride(0),
                               z.const_data_ptr<scalar_t>() + row * z.stride(0), h.size(1));
    }
  });
}

at::Tensor block(const at::Tensor& matrix, int64_t begin, int64_t rows, int64_t columns) {
  return matrix.as_strided({rows, columns}, {matrix.stride(0), 1}, matrix.storage_offset() + begin * matrix.stride(0));
}

// z = x w1^T + b1 for one tile.
template <typename scalar_t>
void hidden(const Experts& experts, int64_t e, const at::Tensor& x, at::Tensor& z) {
  at::mm_out(z, x, experts.w1[e].t());
  if (!experts.b1.empty()) add_bias<scalar_t>(z, experts.b1[e]);
}

// What one worker needs for a tile.
struct Scratch {
  at::Tensor x, z, h;

  Scratch(const Experts& experts, const at::TensorOptions& options, bool with_z)
      : x(at::empty({kTileRows, experts.width}, options)),
        z(at::empty({with_z ? kTileRows : 0, experts.max_rows_w1}, options)),
        h(at::empty({kTileRows, experts.max_hidden}, options)) {}
};

std::vector<Scratch> make_scratch(const Experts& experts, const at::TensorOptions& options, bool with_z) {
  std::vector<Scratch> all;
  for (int i = 0; i < at::get_num_threads(); ++i) all.emplace_back(experts, options, with_z);
  return all;
}

// Intermediates of a wave of experts, in aligned rows from the first of expert `begin` on. All waves use one memory.
struct Wave {
  at::Tensor x, grad, dx, dz, scaled;
  int64_t begin, end;

  int64_t first(const Rows& rows) const { return rows.first[begin]; }
};

template <typename scalar_t>
void activation_backward(const Experts& experts, const Task& task, const at::Tensor& dh, const at::Tensor& z,
                         const std::vector<Accumulator<scalar_t>>& gate, std::vector<Accumulator<scalar_t>>& dgate,
                         at::Tensor& dz, at::Tensor& scaled) {
  by_activation(experts.activation, [&]<Activation kind>() {
    for (int64_t row = 0; row < task.rows; ++row) {
      dgate[task.begin + row] = activate_backward<kind, scalar_t>(
          dz.mutable_data_ptr<scalar_t>() + row * dz.stride(0),
          scaled.mutable_data_ptr<scalar_t>() + row * scaled.stride(0),
          dh.const_data_ptr<scalar_t>() + row * dh.stride(0), z.const_data_ptr<scalar_t>() + row * z.stride(0),
          gate[task.begin + row], scaled.size(1));
    }
  });
}

// The gate multiplies b2 too.
template <typename scalar_t>
void add_bias_to_gate_gradient(const Experts& experts, const Task& task, const at::Tensor& grad,
                               std::vector<Accumulator<scalar_t>>& dgate) {
  const auto* bias = experts.b2[task.expert].const_data_ptr<scalar_t>();
  for (int64_t row = 0; row < task.rows; ++row) {
    const auto* values = grad.const_data_ptr<scalar_t>() + row * grad.stride(0);
    for (int64_t i = 0; i < experts.width; ++i) {
      dgate[task.begin + row] += Accumulator<scalar_t>(widen(values[i])) * widen(bias[i]);
    }
  }
}

// Everything of a tile but the gradients of weights, for which it leaves x, grad, dz and scaled in the wave, and dx.
template <typename scalar_t>
void backward_tile(const Experts& experts, const Rows& rows, const Task& task, const at::Tensor& x,
                   const at::Tensor& saved, const at::Tensor& grad, const std::vector<Accumulator<scalar_t>>& gate,
                   std::vector<Accumulator<scalar_t>>& dgate, Scratch& scratch, Wave& wave) {
  const int64_t e = task.expert, at = task.begin - wave.first(rows), hidden_rows = experts.w1[e].size(0);
  const int64_t width = experts.w2[e].size(1);
  auto x_tile = block(wave.x, at, task.rows, experts.width), grad_tile = block(wave.grad, at, task.rows, experts.width);
  gather<scalar_t>(x_tile, x, rows, task.begin, task.rows);
  gather<scalar_t>(grad_tile, grad, rows, task.begin, task.rows);
  auto z = saved.size(0) ? block(saved, task.begin, task.rows, hidden_rows)
                         : block(scratch.z, 0, task.rows, hidden_rows);
  if (!saved.size(0)) hidden<scalar_t>(experts, e, x_tile, z);
  auto dh = block(scratch.h, 0, task.rows, width);
  at::mm_out(dh, grad_tile, experts.w2[e]);
  auto dz = block(wave.dz, at, task.rows, hidden_rows), scaled = block(wave.scaled, at, task.rows, width);
  activation_backward<scalar_t>(experts, task, dh, z, gate, dgate, dz, scaled);
  if (!experts.b2.empty()) add_bias_to_gate_gradient<scalar_t>(experts, task, grad_tile, dgate);
  auto dx_tile = block(wave.dx, at, task.rows, experts.width);
  at::mm_out(dx_tile, dz, experts.w1[e]);
}

template <typename scalar_t>
void bias_gradients(const Experts& experts, const Rows& rows, int64_t e, const Wave& wave,
                    const std::vector<Accumulator<scalar_t>>& gate, ExpertGradients& out) {
  using acc_t = Accumulator<scalar_t>;
  const auto add = [&](const at::Tensor& values, at::Tensor& bias, bool gated) {
    std::vector<acc_t> sums(bias.size(0), 0);
    for (int64_t row = rows.first[e]; row < rows.first[e] + rows.count[e]; ++row) {
      const auto* from = values.const_data_ptr<scalar_t>() + (row - wave.first(rows)) * values.stride(0);
      for (size_t i = 0; i < sums.size(); ++i) sums[i] += (gated ? gate[row] : acc_t(1)) * acc_t(widen(from[i]));
    }
    for (size_t i = 0; i < sums.size(); ++i) store(bias.mutable_data_ptr<scalar_t>()[i], sums[i]);
  };
  if (!experts.b1.empty()) add(wave.dz, out.b1[e], false);
  if (!experts.b2.empty()) add(wave.grad, out.b2[e], true);
}

// What follows on the tiles of experts `begin` to `end`: first the sink, in one part a thread (expert kNone, part
// `begin` of `rows`), then blocks of dw1 = dz^T x and dw2 = grad^T scaled: `rows` < 0 marks dw2, `begin` is its first row.
Phase later_tasks(const Experts& experts, const Rows& rows, int64_t begin, int64_t end) {
  Phase tasks;
  const int64_t parts = at::get_num_threads();
  for (int64_t part = 0; part < parts; ++part) {
    tasks.push_back({kNone, part, parts, std::numeric_limits<int64_t>::max()});
  }
  for (int64_t e = begin; e < end; ++e) {
    if (rows.count[e] == 0) continue;
    for (int64_t at = 0; at < experts.w1[e].size(0); at += kWeightBlock) {
      const int64_t size = std::min(kWeightBlock, experts.w1[e].size(0) - at);
      tasks.push_back({e, at, size, size * experts.width * rows.count[e]});
    }
    for (int64_t at = 0; at < experts.width; at += kWeightBlock) {
      const int64_t size = std::min(kWeightBlock, experts.width - at);
      tasks.push_back({e, at, -size, size * experts.w2[e].size(1) * rows.count[e]});
    }
  }
  return tasks;
}

void weight_gradient(const Experts& experts, const Rows& rows, const Task& task, const Wave& wave,
                     ExpertGradients& out) {
  const int64_t e = task.expert, at = rows.first[e] - wave.first(rows), count = aligned(rows.count[e]);
  const bool second = task.rows < 0;
  const int64_t size = std::abs(task.rows), width = second ? experts.w2[e].size(1) : experts.width;
  const auto& left = second ? wave.grad : wave.dz;
  const auto& right = second ? wave.scaled : wave.x;
  auto target = block(second ? out.w2[e] : out.w1[e], task.begin, size, width);
  at::mm_out(target, block(left, at, count, left.size(1)).narrow(1, task.begin, size).t(),
             block(right, at, count, width));
}

std::vector<at::Tensor> gradients_like(const std::vector<at::Tensor>& weights, const Rows& rows) {
  std::vector<at::Tensor> all;
  for (size_t e = 0; e < weights.size(); ++e) {
    all.push_back(rows.count[e] ? at::empty(weights[e].sizes(), weights[e].options()) : at::zeros_like(weights[e]));
  }
  return all;
}

// The experts from `begin` on whose rows make one wave: as many as it holds, at least one. Waves change no result.
int64_t wave_end(const Rows& rows, int64_t begin) {
  const int64_t wave_rows = kWaveRows * std::max(2, at::get_num_threads());
  int64_t end = begin, total = 0;
  const int64_t num_experts = static_cast<int64_t>(rows.count.size());
  while (end < num_experts && (end == begin || total + aligned(rows.count[end]) <= wave_rows)) {
    total += aligned(rows.count[end++]);
  }
  return end;
}

int64_t largest_wave(const Rows& rows) {
  int64_t largest = 0;
  for (int64_t begin = 0; begin < static_cast<int64_t>(rows.count.size());) {
    int64_t total = 0;
    for (const int64_t end = wave_end(rows, begin); begin < end; ++begin) total += aligned(rows.count[begin]);
    largest = std::max(largest, total);
  }
  return largest;
}

Activation parse_activation(const char* op, std::string_view name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "relu2") return Activation::kRelu2;
  TORCH_CHECK(name == "swiglu", op, ": activation must be gelu, relu2 or swiglu, but is ", name);
  return Activation::kSwiglu;
}

}  // namespace

Experts::Experts(const char* op, at::TensorList w1_, at::TensorList w2_, at::TensorList b1_, at::TensorList b2_,
                 std::string_view activation_, const at::Tensor& like)
    : activation(parse_activation(op, activation_)), width(like.size(1)), max_hidden(0), max_rows_w1(0) {
  TORCH_CHECK(!w1_.empty() && w1_.size() == w2_.size(), op, ": w1 and w2 must hold one tensor an expert, but hold ",
              w1_.size(), " and ", w2_.size());
  TORCH_CHECK((b1_.empty() || b1_.size() == w1_.size()) && (b2_.empty() || b2_.size() == w1_.size()), op,
              ": b1 and b2 must hold one tensor an expert or none");
  const auto add = [&](std::vector<at::Tensor>& to, const char* name, const at::Tensor& one, at::IntArrayRef sizes) {
    check_same_type(op, name, one, like);
    check_device(op, name, one, like);
    TORCH_CHECK(one.sizes() == sizes, op, ": ", name, " of expert ", to.size(), " must have shape ", sizes,
                ", but has ", one.sizes());
    to.push_back(one.contiguous());
  };
  for (size_t e = 0; e < w1_.size(); ++e) {
    TORCH_CHECK(w2_[e].dim() == 2, op, ": w2 must have shape (D, F), but has ", w2_[e].dim(), " dimensions");
    const int64_t hidden = w2_[e].size(1), rows = hidden * (activation == Activation::kSwiglu ? 2 : 1);
    add(w1, "w1", w1_[e], {rows, width});
    add(w2, "w2", w2_[e], {width, hidden});
    if (!b1_.empty()) add(b1, "b1", b1_[e], {rows});
    if (!b2_.empty()) add(b2, "b2", b2_[e], {width});
    max_hidden = std::max(max_hidden, hidden);
    max_rows_w1 = std::max(max_rows_w1, rows);
  }
}

std::vector<int64_t> hidden_shape(const Experts& experts, int64_t num_rows) {
  return {num_rows + (kAlignment - 1) * experts.size(), experts.max_rows_w1};
}

template <typename scalar_t>
at::Tensor experts_forward(const Experts& experts, const Rows& rows, const at::Tensor& x, at::Tensor& z) {
  const bool keep = z.size(0) > 0;
  if (keep) z.narrow(0, rows.total(), z.size(0) - rows.total()).zero_();
  auto y = at::empty({rows.total(), experts.width}, x.options());
  auto scratch = make_scratch(experts, x.options(), !keep);
  run_phases({row_tasks(experts, rows, 0, experts.size())}, [&](size_t, const Task& task, int64_t worker) {
    auto& own = scratch[worker];
    const int64_t e = task.expert, hidden_rows = experts.w1[e].size(0), width = experts.w2[e].size(1);
    auto x_tile = block(own.x, 0, task.rows, experts.width);
    gather<scalar_t>(x_tile, x, rows, task.begin, task.rows);
    auto z_tile = keep ? block(z, task.begin, task.rows, hidden_rows) : block(own.z, 0, task.rows, hidden_rows);
    hidden<scalar_t>(experts, e, x_tile, z_tile);
    if (keep && hidden_rows < z.size(1)) {
      block(z, task.begin, task.rows, z.size(1)).narrow(1, hidden_rows, z.size(1) - hidden_rows).zero_();
    }
    auto h = block(own.h, 0, task.rows, width);
    activate_rows<scalar_t>(experts.activation, h, z_tile);
    auto y_tile = block(y, task.begin, task.rows, experts.width);
    at::mm_out(y_tile, h, experts.w2[e].t());
    if (!experts.b2.empty()) add_bias<scalar_t>(y_tile, experts.b2[e]);
  });
  return y;
}

template <typename scalar_t>
ExpertGradients experts_backward(const Experts& experts, const Rows& rows, const at::Tensor& x, const at::Tensor& z,
                                 const at::Tensor& grad, const std::vector<Accumulator<scalar_t>>& gate,
                                 std::vector<Accumulator<scalar_t>>& dgate, const RowSink& sink) {
  const auto options = x.options();
  ExpertGradients out{gradients_like(experts.w1, rows), gradients_like(experts.w2, rows),
                      gradients_like(experts.b1, rows), gradients_like(experts.b2, rows)};
  auto scratch = make_scratch(experts, options, z.size(0) == 0);
  const int64_t held = largest_wave(rows);
  const auto held_rows = [&](int64_t width) { return at::empty({held, width}, options); };
  const Wave memory{held_rows(experts.width),       held_rows(experts.width),      held_rows(experts.width),
                    held_rows(experts.max_rows_w1), held_rows(experts.max_hidden), 0, 0};
  std::vector<Wave> waves;
  std::vector<Phase> phases;
  for (int64_t begin = 0, end = 0; begin < experts.size(); begin = end) {
    end = wave_end(rows, begin);
    waves.push_back(memory);
    waves.back().begin = begin, waves.back().end = end;
    phases.push_back(row_tasks(experts, rows, begin, end));
    phases.push_back(later_tasks(experts, rows, begin, end));
  }
  run_phases(std::move(phases), [&](size_t phase, const Task& task, int64_t worker) {
    auto& wave = waves[phase / 2];
    if (phase % 2 == 0) {
      backward_tile<scalar_t>(experts, rows, task, x, z, grad, gate, dgate, scratch[worker], wave);
    } else if (task.expert == kNone) {
      sink(wave.begin, wave.end, wave.dx, task.begin, task.rows);
    } else {
      weight_gradient(experts, rows, task, wave, out);
      if (task.begin == 0 && task.rows > 0) bias_gradients<scalar_t>(experts, rows, task.expert, wave, gate, out);
    }
  });
  return out;
}

#define MOEMM_INSTANTIATE(scalar_t)                                                                               \
  template at::Tensor experts_forward<scalar_t>(const Experts&, const Rows&, const at::Tensor&, at::Tensor&);     \
  template ExpertGradients experts_backward<scalar_t>(                                                            \
      const Experts&, const Rows&, const at::Tensor&, const at::Tensor&, const at::Tensor&,                       \
      const std::vector<Accumulator<scalar_t>>&, std::vector<Accumulator<scalar_t>>&, const RowSink&);
MOEMM_INSTANTIATE(float)
MOEMM_INSTANTIATE(double)
MOEMM_INSTANTIATE(c10::BFloat16)
#undef MOEMM_INSTANTIATE

}  // namespace moemm::cpu
