// Work in phases, in one parallel region.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace moemm::cpu {

struct Task {
  int64_t expert, begin, rows;  // what they mean is up to the phase
  int64_t cost;
};

using Phase = std::vector<Task>;

// Tasks that are left in each phase. A thread that has to wait sleeps: where cores are shared with other processes,
// one that spins at a barrier burns the time that the thread it waits for would need.
class PhaseCounters {
 public:
  explicit PhaseCounters(const std::vector<Phase>& phases) : left_(phases.size()) {
    for (size_t i = 0; i < phases.size(); ++i) left_[i] = static_cast<int64_t>(phases[i].size());
  }

  // Until all tasks of the phases before `phase` are done; false if one of them failed.
  bool wait_before(size_t phase) {
    if (phase > 0) wait(left_[phase - 1]);
    return !failed_;
  }

  void done(size_t phase) {
    if (left_[phase].fetch_sub(1) == 1) left_[phase].notify_all();
  }

  void fail() {
    failed_ = true;
    for (auto& left : left_) {
      left = 0;
      left.notify_all();
    }
  }

 private:
  static void wait(std::atomic<int64_t>& left) {
    for (int tries = 0; tries < 1000; ++tries) {
      if (left.load() <= 0) return;
    }
    for (int64_t now = left.load(); now > 0; now = left.load()) left.wait(now);
  }

  std::vector<std::atomic<int64_t>> left_;
  std::atomic<bool> failed_{false};
};

// Phases one after the other, on all threads; in a phase the most costly tasks first, and each thread takes the next one
// when it is free. `body(phase, task, worker)` runs in a parallel region, so that products inside stay on their thread,
// always in the same shapes. Threads take tasks in order and wait only for tasks that others have taken before, so that
// any number of threads, one too, comes to the end.
template <typename Body>
void run_phases(std::vector<Phase> phases, const Body& body) {
  std::vector<std::pair<size_t, const Task*>> queue;
  for (size_t i = 0; i < phases.size(); ++i) {
    std::stable_sort(phases[i].begin(), phases[i].end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
    for (const auto& task : phases[i]) queue.emplace_back(i, &task);
  }
  PhaseCounters counters(phases);
  std::atomic<size_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    for (int64_t worker = begin; worker < end; ++worker) {
      for (size_t i = next++; i < queue.size(); i = next++) {
        const auto [phase, task] = queue[i];
        if (!counters.wait_before(phase)) return;
        try {
          body(phase, *task, worker);
        } catch (...) {
          counters.fail();
          throw;
        }
        counters.done(phase);
      }
    }
  });
}

}  // namespace moemm::cpu
