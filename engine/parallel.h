// Runs a function over items on a few short-lived threads; for work measured in milliseconds.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace twilight {

// Calls run(item) for every item, in order of arrival at the threads. After an exception no new
// item starts; the first exception is thrown once all threads are done.
template <typename T, typename Run>
void parallel_for(const std::vector<T>& items, int max_threads, Run run) {
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  std::mutex error_mutex;
  auto work = [&] {
    for (size_t i = next++; i < items.size() && !failed; i = next++) {
      try {
        run(items[i]);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        failed = true;
      }
    }
  };
  const int hardware = std::max(1u, std::thread::hardware_concurrency());
  const int wanted = static_cast<int>(std::min<size_t>(items.size(), max_threads));
  std::vector<std::jthread> threads;
  for (int i = 1; i < std::min(wanted, hardware); ++i) threads.emplace_back(work);
  work();
  threads.clear();  // joins
  if (error) std::rethrow_exception(error);
}

}  // namespace twilight
