// The engine under threads, without Python and CUDA; `make test-sanitizers` builds and runs it
// under ASan + UBSan and under TSan. Prints "engine: ok"; a broken check ends the program with its
// line.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "engine/arena.h"
#include "engine/page_pool.h"
#include "engine/parallel.h"
#include "engine/transfers.h"

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                            \
    }                                                                          \
  } while (false)

namespace {

using namespace twilight;

template <typename Error, typename Run>
bool throws(Run run) {
  try {
    run();
  } catch (const Error&) {
    return true;
  }
  return false;
}

constexpr int kThreads = 6;

void run_threads(const std::function<void(int)>& run) {
  std::vector<std::jthread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(run, i);
}

// Each thread allocates, shares, releases and completes epochs; `owner` catches a page with two
// owners, the final counts a page that is lost.
void stress_pool() {
  constexpr int kPages = 96;
  PagePool pool(kPages);
  std::vector<std::atomic<int>> owner(kPages);
  std::atomic<int64_t> epoch{0};
  std::atomic<int64_t> refused{0};
  run_threads([&](int thread) {
    std::mt19937 random(thread);
    std::vector<std::vector<int32_t>> held;
    for (int step = 0; step < 2000; ++step) {
      if (random() % 2 == 0 || held.empty()) {
        try {
          held.push_back(pool.allocate(1 + random() % 12, random() % 2, random() % kPages));
          for (const int32_t page : held.back()) CHECK(owner[page].exchange(thread + 1) == 0);
        } catch (const OutOfPages& e) {
          CHECK(e.free < e.wanted);
          ++refused;
          for (const auto& pages : held) {
            for (const int32_t page : pages) owner[page] = 0;
            pool.release(pages, ++epoch);
          }
          held.clear();
          pool.complete(epoch);
        }
      } else {
        const auto pages = held.back();
        held.pop_back();
        pool.share(pages);
        pool.mark_sparse(pages);
        for (const int32_t page : pages) CHECK(!pool.is_exact(page) && pool.references(page) == 2);
        pool.release(pages, ++epoch);
        for (const int32_t page : pages) CHECK(owner[page].exchange(0) == thread + 1);
        pool.release(pages, epoch);
        if (random() % 4 == 0) pool.complete(epoch);
      }
    }
    for (const auto& pages : held) {
      for (const int32_t page : pages) owner[page] = 0;
      pool.release(pages, ++epoch);
    }
  });
  CHECK(refused > 0);
  pool.complete(epoch);
  CHECK(pool.num_free() == kPages && pool.num_pending() == 0);
  CHECK(pool.allocate(kPages, true, -1).back() == kPages - 1);
  CHECK(throws<OutOfPages>([&] { pool.allocate(1, true, -1); }));
}

// Threads write and read pages of their own through Transfers while the arena grows.
void stress_transfers() {
  constexpr int64_t kPageBytes = 16 << 10;
  constexpr int64_t kPages = 64;
  const ArenaShape shape{3, 2, kPages * kThreads, kPageBytes};
  HostArena arena(shape, -1);
  Transfers transfers(arena);
  arena.ensure_pages(1);
  CHECK(arena.grown_pages() < shape.num_pages);
  run_threads([&](int thread) {
    std::mt19937 random(thread);
    std::vector<std::byte> out(2 * 4 * kPageBytes), back(out.size());
    for (int64_t step = 1; step <= 60; ++step) {
      arena.ensure_pages(step * shape.num_pages / 60);
      // Pages of this thread: every kThreads-th pair. Two pairs make two runs.
      const int32_t pairs = arena.grown_pages() / (2 * kThreads);
      if (pairs < 2) continue;
      const int32_t a = random() % pairs, b = (a + 1 + random() % (pairs - 1)) % pairs;
      std::vector<int32_t> pages;
      for (const int32_t pair : {a, b}) {
        const int32_t page = 2 * (pair * kThreads + thread);
        pages.insert(pages.end(), {page, page + 1});
      }
      const PageSelection selection{static_cast<int64_t>(random() % 3), 0, 2, pages};
      for (auto& byte : out) byte = std::byte(random());
      transfers.copy(Direction::kToHost, selection, out.data(), out.size(), nullptr);
      transfers.copy(Direction::kToDevice, selection, back.data(), back.size(), nullptr);
      CHECK(out == back);
      const std::byte* row = arena.data() + arena.offset(selection.layer, 1, pages[2]);
      CHECK(std::memcmp(row, out.data() + 6 * kPageBytes, kPageBytes) == 0);
    }
  });
  const TransferTotals in = transfers.totals(Direction::kToDevice);
  const TransferTotals written = transfers.totals(Direction::kToHost);
  CHECK(in.bytes > 0 && in.bytes == written.bytes && in.timed_bytes == in.bytes);
  CHECK(in.copies == in.bytes / (2 * kPageBytes));

  std::vector<std::byte> buffer(kPageBytes);
  auto copy = [&](PageSelection s, int64_t bytes) {
    transfers.copy(Direction::kToHost, s, buffer.data(), bytes, nullptr);
  };
  const std::vector<int32_t> first{0}, beyond{static_cast<int32_t>(arena.grown_pages())};
  CHECK(throws<std::invalid_argument>([&] { copy({0, 0, 1, beyond}, kPageBytes); }));
  CHECK(throws<std::invalid_argument>([&] { copy({3, 0, 1, first}, kPageBytes); }));
  CHECK(throws<std::invalid_argument>([&] { copy({0, 0, 3, first}, 3 * kPageBytes); }));
  CHECK(throws<std::invalid_argument>([&] { copy({0, 0, 1, first}, kPageBytes - 1); }));
  arena.close();
  CHECK(arena.touched_bytes() == 0 && arena.registered_bytes() == 0);
  CHECK(throws<std::invalid_argument>([&] { copy({0, 0, 1, first}, kPageBytes); }));
}

// Closing races with growing: whoever is second either finds the arena closed or grows it first.
void stress_close() {
  for (int round = 0; round < 20; ++round) {
    HostArena arena({2, 2, 512, 8 << 10}, -1);
    run_threads([&](int thread) {
      try {
        for (int64_t pages = 1; pages <= 512; pages *= 2) arena.ensure_pages(pages);
      } catch (const std::runtime_error&) {
        CHECK(arena.closed());
      }
      if (thread % 2 == 0) arena.close();
    });
    CHECK(arena.closed() && arena.grown_pages() == 0 && arena.touched_bytes() == 0);
  }
}

void check_parallel() {
  std::vector<int> items(1000);
  std::iota(items.begin(), items.end(), 0);
  std::atomic<int64_t> sum{0};
  parallel_for(items, 8, [&](int item) { sum += item; });
  CHECK(sum == 499500);
  CHECK(throws<HostMemoryError>([&] {
    parallel_for(items, 8, [](int item) {
      if (item == 17) throw HostMemoryError("seventeen");
    });
  }));
}

}  // namespace

int main() {
  check_parallel();
  stress_pool();
  stress_transfers();
  stress_close();
  std::puts("engine: ok");
  return 0;
}
