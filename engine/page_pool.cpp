#include "engine/page_pool.h"

#include <algorithm>
#include <limits>

namespace twilight {

PagePool::PagePool(int64_t num_pages) {
  if (num_pages < 1 || num_pages > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("num_pages is " + std::to_string(num_pages) +
                                "; it must lie in [1, 2147483647]");
  }
  pages_.resize(num_pages);
  free_runs_[0] = static_cast<int32_t>(num_pages);
  num_free_ = num_pages;
}

PagePool::Page& PagePool::checked(int32_t page, const char* what) {
  if (page < 0 || page >= num_pages()) {
    throw std::invalid_argument("page " + std::to_string(page) + " is not one of the pool's " +
                                std::to_string(num_pages()));
  }
  if (pages_[page].references == 0) {
    throw std::invalid_argument("page " + std::to_string(page) + " cannot be " + what +
                                ": nobody holds it");
  }
  return pages_[page];
}

// Takes the first n pages of a free run.
void PagePool::take(std::map<int32_t, int32_t>::iterator run, int32_t n,
                    std::vector<int32_t>& out) {
  const auto [first, length] = *run;
  for (int32_t i = 0; i < n; ++i) out.push_back(first + i);
  free_runs_.erase(run);
  if (n < length) free_runs_[first + n] = length - n;
  num_free_ -= n;
}

std::vector<int32_t> PagePool::allocate(int64_t n, bool exact, int32_t after) {
  const std::lock_guard lock(mutex_);
  if (n < 0) throw std::invalid_argument("n is " + std::to_string(n) + "; it must be >= 0");
  if (n > num_free_) {
    std::string message = "out of KV pages: " + std::to_string(n) + " wanted, " +
                          std::to_string(num_free_) + " free of " + std::to_string(num_pages());
    if (num_pending_ > 0) {
      message += " (" + std::to_string(num_pending_) + " more wait for copies to end)";
    }
    throw OutOfPages(n, num_free_,
                     message + "; raise KVConfig.host_bytes, or run fewer or shorter requests");
  }
  std::vector<int32_t> out;
  out.reserve(n);
  while (static_cast<int64_t>(out.size()) < n) {
    const int32_t left = static_cast<int32_t>(n - static_cast<int64_t>(out.size()));
    auto best = out.empty() && after >= 0 ? free_runs_.find(after + 1) : free_runs_.end();
    if (best == free_runs_.end() || best->second < left) {
      best = free_runs_.begin();
      for (auto run = free_runs_.begin(); run != free_runs_.end(); ++run) {
        const bool fits = run->second >= left, best_fits = best->second >= left;
        const bool better =
            fits && best_fits ? run->second < best->second : run->second > best->second;
        if (better) best = run;
      }
    }
    take(best, std::min(left, best->second), out);
  }
  std::sort(out.begin(), out.end());
  for (const int32_t page : out) pages_[page] = {1, exact, -1};
  return out;
}

void PagePool::share(std::span<const int32_t> pages) {
  const std::lock_guard lock(mutex_);
  for (const int32_t page : pages) checked(page, "shared");
  for (const int32_t page : pages) ++pages_[page].references;
}

void PagePool::release(std::span<const int32_t> pages, int64_t epoch) {
  const std::lock_guard lock(mutex_);
  size_t done = 0;
  try {
    for (; done < pages.size(); ++done) --checked(pages[done], "released").references;
  } catch (...) {
    while (done > 0) ++pages_[pages[--done]].references;
    throw;
  }
  for (const int32_t id : pages) pages_[id].epoch = std::max(pages_[id].epoch, epoch);
  // Sorted, so that a page named twice is met twice in a row.
  std::vector<int32_t> dropped(pages.begin(), pages.end());
  std::sort(dropped.begin(), dropped.end());
  dropped.erase(std::unique(dropped.begin(), dropped.end()), dropped.end());
  for (const int32_t id : dropped) {
    const Page& page = pages_[id];
    if (page.references > 0) continue;
    if (page.epoch <= completed_) {
      give_back(id);
    } else {
      pending_[page.epoch].push_back(id);
      ++num_pending_;
    }
  }
}

void PagePool::complete(int64_t epoch) {
  const std::lock_guard lock(mutex_);
  completed_ = std::max(completed_, epoch);
  while (!pending_.empty() && pending_.begin()->first <= completed_) {
    const std::vector<int32_t>& ids = pending_.begin()->second;
    num_pending_ -= static_cast<int64_t>(ids.size());
    for (const int32_t id : ids) give_back(id);
    pending_.erase(pending_.begin());
  }
}

// Adds a page to the free runs, joined with its neighbours.
void PagePool::give_back(int32_t page) {
  int32_t first = page, length = 1;
  auto next = free_runs_.lower_bound(page);
  if (next != free_runs_.end() && next->first == page + 1) {
    length += next->second;
    next = free_runs_.erase(next);
  }
  if (next != free_runs_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == page) {
      first = previous->first;
      length += previous->second;
    }
  }
  free_runs_[first] = length;
  ++num_free_;
}

void PagePool::mark_sparse(std::span<const int32_t> pages) {
  const std::lock_guard lock(mutex_);
  for (const int32_t page : pages) checked(page, "marked");
  for (const int32_t page : pages) pages_[page].exact = false;
}

int32_t PagePool::references(int32_t page) const {
  const std::lock_guard lock(mutex_);
  return page < 0 || page >= num_pages() ? 0 : pages_[page].references;
}

bool PagePool::is_exact(int32_t page) const {
  const std::lock_guard lock(mutex_);
  return page >= 0 && page < num_pages() && pages_[page].references > 0 && pages_[page].exact;
}

int64_t PagePool::num_free() const {
  const std::lock_guard lock(mutex_);
  return num_free_;
}

int64_t PagePool::num_pending() const {
  const std::lock_guard lock(mutex_);
  return num_pending_;
}

}  // namespace twilight
