#include "schedules.hpp"

#include <algorithm>
#include <functional>

#include "arrays.hpp"

namespace gatewise {

HeldSchedule::HeldSchedule(Size steps, Size batch, const std::int64_t* lengths, const std::uint8_t* resets, bool packed)
    : steps_(steps), batch_(batch) {
  if (steps < 0 || batch < 0) throw py::value_error("internal: a negative size");
  if (packed && !(lengths && std::is_sorted(lengths, lengths + batch, std::greater<>())))
    throw py::value_error("internal: packed rows must be sorted by their lengths");
  if (lengths) {
    const std::vector<Size> row_lengths(lengths, lengths + batch);
    const auto [shortest, longest] = std::minmax_element(row_lengths.begin(), row_lengths.end());
    if (steps != (batch ? *longest : 0) || (batch && *shortest < 0))
      throw py::value_error("internal: lengths do not fit the steps");
    memory_.resize(steps, batch);
    schedule_ = memory_.make(row_lengths.data(), steps);
    schedule_.packed = packed;
  }
  if (resets) {
    resets_.assign(resets, resets + steps * batch);
    schedule_.resets = resets_.data();
  }
}

const Schedule& HeldSchedule::checked(Size steps, Size batch) const {
  if (steps != steps_ || batch != batch_) throw py::value_error("internal: a schedule for other sizes");
  return schedule_;
}

void bind_schedules(py::module_& module) {
  using namespace py::literals;
  py::class_<HeldSchedule, std::shared_ptr<HeldSchedule>>(module, "Schedule")
      .def(py::init([](Size steps, Size batch, const Array& lengths, const Array& resets, bool packed) {
             const void* const row_lengths = flat(NPY_INT64, lengths, batch, false);
             const void* const flags = flat(NPY_BOOL, resets, steps * batch, false);
             return std::make_shared<HeldSchedule>(steps, batch, static_cast<const std::int64_t*>(row_lengths),
                                                   static_cast<const std::uint8_t*>(flags), packed);
           }),
           "steps"_a, "batch"_a, "lengths"_a, "resets"_a, "packed"_a = false);
}

}  // namespace gatewise
