// Page ids with reference counts. A page is one block of tokens across all layers and heads.
//
// A page that loses its last reference is *pending* until the epoch named at its release is
// complete, that is until every copy and kernel that may touch it is done; only then is it handed
// out again. Epochs are numbers that the caller counts up, one a step.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace twilight {

class OutOfPages : public std::runtime_error {
 public:
  OutOfPages(int64_t wanted, int64_t free, const std::string& message)
      : std::runtime_error(message), wanted(wanted), free(free) {}
  const int64_t wanted;
  const int64_t free;
};

// Thread safe. Every call changes everything it names or, when it throws, nothing.
class PagePool {
 public:
  // Throws std::invalid_argument for num_pages < 1 or above 2^31 - 1.
  explicit PagePool(int64_t num_pages);

  // Takes n pages with one reference each, ascending; one contiguous run where a free run is long
  // enough (the one right after page `after`, else the shortest, lowest one), otherwise the
  // longest runs there are. exact tells whether exact prefill will fill them. Throws OutOfPages.
  std::vector<int32_t> allocate(int64_t n, bool exact, int32_t after);

  // Adds a reference to each page. Throws std::invalid_argument for a page that has none.
  void share(std::span<const int32_t> pages);

  // Drops a reference of each page (a page named twice loses two). Pages left without any can be
  // reused once `epoch` and every epoch of their earlier releases are complete. Throws
  // std::invalid_argument for a page with too few references.
  void release(std::span<const int32_t> pages, int64_t epoch);

  // Everything up to and including `epoch` is done.
  void complete(int64_t epoch);

  // Rows of these pages come from sparse decode: approximate hidden states, no prefix to share.
  void mark_sparse(std::span<const int32_t> pages);

  int32_t references(int32_t page) const;
  bool is_exact(int32_t page) const;
  int64_t num_pages() const { return static_cast<int64_t>(pages_.size()); }
  int64_t num_free() const;
  int64_t num_pending() const;

 private:
  struct Page {
    int32_t references = 0;
    bool exact = true;
    int64_t epoch = -1;  // latest epoch of a release since it was allocated
  };

  Page& checked(int32_t page, const char* what);
  void take(std::map<int32_t, int32_t>::iterator run, int32_t n, std::vector<int32_t>& out);
  void give_back(int32_t page);

  mutable std::mutex mutex_;
  std::vector<Page> pages_;
  std::map<int32_t, int32_t> free_runs_;             // first page -> length, never adjacent
  std::map<int64_t, std::vector<int32_t>> pending_;  // epoch -> pages
  int64_t num_free_ = 0;
  int64_t num_pending_ = 0;
  int64_t completed_ = -1;
};

}  // namespace twilight
