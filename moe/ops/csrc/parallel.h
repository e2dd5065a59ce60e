// Threads and scratch memory. The threads are those of the OpenMP library that the process has
// already loaded, given to us as a pointer: a second pool would compete with it for the cores.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

namespace gatewise {

typedef void (*ParallelRegion)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
inline ParallelRegion parallel_region = nullptr;

// Scratch memory of one thread; it stays allocated, so its pages are touched for the first time
// once and not in every call.
class Scratch {
 public:
  float* take(int64_t floats) {
    int64_t bytes = (floats * 4 + 63) / 64 * 64;
    if (bytes > bytes_) {
      free(data_);
      data_ = aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<float*>(data_);
  }
  ~Scratch() { free(data_); }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// One piece of memory per thread and purpose.
template <int PURPOSE = 0>
float* scratch(int64_t floats) {
  static thread_local Scratch memory;
  return memory.take(floats);
}

// Call work(0) ... work(tasks - 1) on up to `threads` threads; each takes the next free task.
template <class Work>
void run_tasks(int64_t tasks, int64_t threads, const Work& work) {
  struct Queue {
    std::atomic<int64_t> next;
    int64_t tasks;
    const Work* work;
  } queue{{0}, tasks, &work};
  auto drain = [](void* argument) {
    auto* queue = static_cast<Queue*>(argument);
    for (;;) {
      int64_t task = queue->next.fetch_add(1, std::memory_order_relaxed);
      if (task >= queue->tasks) return;
      (*queue->work)(task);
    }
  };
  if (threads > tasks) threads = tasks;
  if (threads <= 1) {
    drain(&queue);
  } else if (parallel_region) {
    parallel_region(drain, &queue, unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads; i++) others.emplace_back(drain, &queue);
    drain(&queue);
    for (auto& thread : others) thread.join();
  }
}

}  // namespace gatewise
