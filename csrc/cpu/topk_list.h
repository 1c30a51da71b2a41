// The short list of a row: every token of a slice that could still be among the k best, with its coarse score.
#ifndef CCU_FAST_CPU_TOPK_LIST_H_
#define CCU_FAST_CPU_TOPK_LIST_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../ccu_fast.h"
#include "../common/select.h"
#include "simd.h"
#include "topk_row.h"

namespace ccu {
namespace CCU_ISA {

struct Item {
  float key;
  int32_t token;
  friend bool operator<(const Item& a, const Item& b) { return a.key < b.key || (a.key == b.key && a.token < b.token); }
};

struct List {
  Item* items;
  int32_t size, limit;
  bool overflow;
};

// When lists grow and how they are pruned.
class ListRule {
 public:
  explicit ListRule(const ccu_topk_flips_args& a)
      : k_(a.k),
        tokens_(a.tokens),
        capacity_(static_cast<int32_t>(std::min<int64_t>(2 * a.k + 512, a.tokens + 1))),
        first_limit_(static_cast<int32_t>(std::min<int64_t>(2 * a.k + 32, capacity_))) {}

  int32_t capacity() const { return capacity_; }

  List empty(Item* items) const { return {items, 0, first_limit_, false}; }

  // Adds an item, and makes room when the list is full.
  void add(const Row& row, Item item, List& list, float& cutoff) const {
    list.items[list.size++] = item;
    if (list.size == list.limit) tighten(row, list, cutoff);
  }

  // Prunes more than k items to those at or below the cutoff, which it sets, and returns their number.
  int32_t shorten(const Row& row, Item* items, int32_t size, float& cutoff) const {
    std::nth_element(items, items + (k_ - 1), items + size);
    const float kth = items[k_ - 1].key;
    if (row.strict) {
      cutoff = std::nextafter(kth, -kInf);  // a later token of equal score has the higher id
      return static_cast<int32_t>(k_);
    }
    cutoff = cutoff_above(kth, row.err);
    const float highest = cutoff;
    return static_cast<int32_t>(
        std::partition(items + k_, items + size, [=](const Item& item) { return item.key <= highest; }) - items);
  }

 private:
  // Drops items that can no longer be among the first k, and lowers the cutoff.
  void tighten(const Row& row, List& list, float& cutoff) const {
    if (list.size > k_) {
      list.size = shorten(row, list.items, list.size, cutoff);
      // A list that could hold every token cannot overflow.
      if (capacity_ <= tokens_ && list.size > capacity_ - 64) {
        list.overflow = true;
        cutoff = -kInf;
      }
    }
    list.limit = std::min(capacity_, std::max(first_limit_, 2 * list.size));
  }

  const int64_t k_, tokens_;
  const int32_t capacity_, first_limit_;
};

}  // namespace CCU_ISA
}  // namespace ccu

#endif  // CCU_FAST_CPU_TOPK_LIST_H_
