// Which rows of a batch take which steps, for rows of different lengths.
#pragma once

#include <vector>

#include "contract.hpp"

namespace gatewise {

// Owns what a Schedule points to.
class RowSchedule {
 public:
  // Room for so many steps at most. Allocates only where there was never so much.
  void resize(Size steps, Size batch);
  // ends [B]: the number of steps of each row, the largest of them `steps`. Allocates nothing.
  Schedule make(const Size* ends, Size steps);
  // One of these sizes, whose memory may be asked for but not read.
  Schedule any() const;

 private:
  std::vector<Size> order_, lengths_, ends_, active_, taken_;
};

}  // namespace gatewise
