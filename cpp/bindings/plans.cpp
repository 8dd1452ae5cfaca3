// Which rows take which steps, and where their state starts anew, as the core wants to have it.
#include <algorithm>
#include <functional>

#include "python.hpp"

namespace gatewise {
namespace {

// The elements of a C-contiguous array of the given type and size; null for None.
template <class Value>
const Value* elements(const Array& array, int type_number, Size size) {
  if (!array) return nullptr;
  auto* raw = reinterpret_cast<PyArrayObject*>(array->ptr());
  if (PyArray_TYPE(raw) != type_number || !PyArray_ISCARRAY_RO(raw) || PyArray_SIZE(raw) != size)
    throw py::value_error("internal: lengths or resets of the wrong dtype, size or layout");
  return static_cast<const Value*>(PyArray_DATA(raw));
}

}  // namespace

Plan::Plan(Size steps, Size batch, const std::int64_t* lengths, const std::uint8_t* resets, bool packed)
    : steps_(steps), batch_(batch) {
  if (steps < 0 || batch < 0) throw py::value_error("internal: a negative size");
  if (packed && !(lengths && std::is_sorted(lengths, lengths + batch, std::greater<>())))
    throw py::value_error("internal: packed rows must be sorted by their lengths");
  if (lengths) {
    const std::vector<Size> ends(lengths, lengths + batch);
    const auto [least, most] = std::minmax_element(ends.begin(), ends.end());
    if (steps != (batch ? *most : 0) || (batch && *least < 0))
      throw py::value_error("internal: lengths do not fit the steps");
    rows_.resize(steps, batch);
    schedule_ = rows_.make(ends.data(), steps);
    schedule_.packed = packed;
  }
  if (resets) {
    resets_.assign(resets, resets + steps * batch);
    schedule_.resets = resets_.data();
  }
}

const Schedule& Plan::schedule(Size steps, Size batch) const {
  if (steps != steps_ || batch != batch_) throw py::value_error("internal: a plan for other sizes");
  return schedule_;
}

void bind_plans(py::module_& module) {
  using namespace py::literals;
  py::class_<Plan, std::shared_ptr<Plan>>(module, "Plan")
      .def(py::init([](Size steps, Size batch, const Array& lengths, const Array& resets, bool packed) {
             return std::make_shared<Plan>(steps, batch, elements<std::int64_t>(lengths, NPY_INT64, batch),
                                           elements<std::uint8_t>(resets, NPY_BOOL, steps * batch), packed);
           }),
           "steps"_a, "batch"_a, "lengths"_a, "resets"_a, "packed"_a = false);
}

}  // namespace gatewise
