// PyTorch's tensors: weights that were packed and are known again, and the plain calls without gradients. One step
// takes a few microseconds, and asking seven tensors from Python what they are takes several times that. So they are
// looked at here, by DLPack's exchange interface, without compiling against PyTorch; all other calls are left to
// Python.
#include <algorithm>
#include <cstddef>
#include <functional>
#include <new>
#include <numeric>
#include <utility>

#include "../interruption.hpp"
#include "../method.hpp"
#include "../packed.hpp"
#include "dlpack.hpp"

namespace gatewise {
namespace {

// ---- Python -------------------------------------------------------------------------------------------------------

// A new reference, or the exception that there is none.
py::object taken(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object ask(py::handle function) { return taken(PyObject_CallNoArgs(function.ptr())); }
py::object ask(py::handle function, PyObject* argument) { return taken(PyObject_CallOneArg(function.ptr(), argument)); }

bool is_true(const py::object& answer) {
  const int found = PyObject_IsTrue(answer.ptr());
  if (found < 0) throw py::error_already_set();
  return found;
}

// ---- what PyTorch is asked ----------------------------------------------------------------------------------------

struct TensorLibrary {
  py::capsule exchange;
  py::object tensor, parameter;  // types
  py::object is_negative;        // of a tensor
  py::object threads;            // how many PyTorch uses
  py::tuple busy;                // whether PyTorch does something at the moment that a step here would pass by
  py::str version{"_version"};

  const dlpack::ExchangeApi* api() const {
    return static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange.ptr(), dlpack::capsule_name));
  }

  bool is_busy() const {
    return std::any_of(busy.begin(), busy.end(), [](py::handle question) { return is_true(ask(question)); });
  }

  bool is_tensor(PyObject* object) const {
    const auto* kind = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return kind == tensor.ptr() || kind == parameter.ptr();
  }

  // Whether it is a tensor whose numbers are what lies in its memory. Lets other threads in.
  bool is_plain(PyObject* object) const { return is_tensor(object) && !is_true(ask(is_negative, object)); }

  // Whether a plain tensor is a dense one of float32 or float64 in this process's memory; `found` says where. Lets no
  // other thread in, so that it stays there as long as nothing else does.
  bool locate(PyObject* object, dlpack::Tensor& found) const {
    if (api()->look(object, &found) != 0) {
      PyErr_Clear();
      return false;
    }
    if (found.device.type != dlpack::cpu || found.dtype.code != dlpack::floating || found.dtype.lanes != 1)
      return false;
    if (found.dtype.bits != 32 && found.dtype.bits != 64) return false;
    const bool is_empty = std::count(found.shape, found.shape + found.axes, 0) > 0;
    if (!found.data && !is_empty) return false;
    found.data = static_cast<char*>(found.data) + found.byte_offset;
    return true;
  }

  bool look(PyObject* object, dlpack::Tensor& found) const { return is_plain(object) && locate(object, found); }

  // -1: PyTorch does not count the changes of this tensor
  std::int64_t version_of(PyObject* tensor_object) const {
    PyObject* found = PyObject_GetAttr(tensor_object, version.ptr());
    if (!found) {
      PyErr_Clear();
      return -1;
    }
    return PyLong_AsLongLong(taken(found).ptr());
  }
};

bool is_contiguous(const dlpack::Tensor& tensor) {
  Size dense = 1;
  for (std::int32_t i = tensor.axes; i-- > 0; dense *= tensor.shape[i])
    if (tensor.shape[i] != 1 && tensor.strides[i] != dense) return false;
  return true;
}

// ---- weights ------------------------------------------------------------------------------------------------------

#ifdef Py_GIL_DISABLED
constexpr bool other_threads_wait = false;
#else
constexpr bool other_threads_wait = true;  // until they are let in
#endif

Size elements_of(const dlpack::Tensor& tensor) {
  return std::accumulate(tensor.shape, tensor.shape + tensor.axes, Size(1), std::multiplies<>());
}

// Whether the elements fill the memory from the first to the last one, in whatever order.
bool is_dense(const dlpack::Tensor& tensor) {
  Size extent = 1;
  for (std::int32_t i = 0; i < tensor.axes; ++i) extent += (tensor.shape[i] - 1) * tensor.strides[i];
  const Size elements = elements_of(tensor);
  return elements == 0 || elements == extent;
}

// What the core reads and writes as it is. Weights need not be: packing copies them.
bool is_aligned(const dlpack::Tensor& tensor) {
  return reinterpret_cast<std::uintptr_t>(tensor.data) % (tensor.dtype.bits / 8) == 0;
}

Memory memory_of(const dlpack::Tensor& dense) { return {dense.data, elements_of(dense) * (dense.dtype.bits / 8)}; }

// What one weight was when it was packed.
class KnownWeight {
 public:
  KnownWeight(const dlpack::Tensor& tensor, std::int64_t version)
      : data_(tensor.data),
        bits_(tensor.dtype.bits),
        shape_(tensor.shape, tensor.shape + tensor.axes),
        strides_(tensor.strides, tensor.strides + tensor.axes),
        version_(version) {}

  bool has_layout_of(const dlpack::Tensor& tensor) const {
    return bits_ == tensor.dtype.bits && shape_.size() == static_cast<std::size_t>(tensor.axes) &&
           std::equal(shape_.begin(), shape_.end(), tensor.shape) &&
           std::equal(strides_.begin(), strides_.end(), tensor.strides);
  }
  // Whether PyTorch has counted no change since then, nor given it other memory.
  bool is_unchanged(const dlpack::Tensor& tensor, std::int64_t version) const {
    return data_ == tensor.data && version_ == version && has_layout_of(tensor);
  }

 private:
  const void* data_;
  std::uint8_t bits_;
  std::vector<std::int64_t> shape_, strides_;
  std::int64_t version_;
};

// Weights of a module, packed, and what tells whether they are the present ones: a fingerprint of all their numbers,
// made at each call. That of a frozen module is made only where PyTorch has counted a change, or where weights are
// other tensors.
class TensorWeights {
 public:
  TensorWeights(std::shared_ptr<const TensorLibrary> library, py::tuple names, const py::tuple& given,
                const py::function& pack, bool is_frozen)
      : library_(std::move(library)), kernels_(*active_backend().float32), names_(std::move(names)) {
    // Tensors of our own, since another thread may give a parameter other memory.
    std::vector<py::object> weights;
    for (const py::handle weight : given) {
      const std::int64_t version = library_->version_of(weight.ptr());
      weights.push_back(weight.attr("detach")());
      py::object dense = weights.back();
      dlpack::Tensor found;
      require(library_->look(dense.ptr(), found), "internal: weights that are not plain");
      if (!is_dense(found)) {
        dense = dense.attr("contiguous")();
        require(library_->look(dense.ptr(), found), "internal: weights that are not plain");
        found.data = nullptr;  // a copy, to whose address other weights may come
      }
      known_.emplace_back(found, version);
      bytes_ += memory_of(found).bytes;
    }
    fingerprint_ = fingerprint_of(weights);
    packed_ = present(pack(py::tuple(py::cast(weights))).cast<std::shared_ptr<const Packed>>());
    // What another thread, or process, has written meanwhile may be packed in part.
    if (fingerprint_ != fingerprint_of(weights)) fingerprint_.reset();
    if (is_frozen) held_ = std::move(weights);
  }

  // Whether a later call may find that these are the present ones.
  bool is_cacheable() const { return fingerprint_.has_value(); }

  bool hold(const py::tuple& weights) const { return hold(items(weights)); }
  // Of a module's parameters by name; false where one has another home, as with a parametrization.
  bool hold(PyObject* parameters) const {
    std::vector<py::object> weights;  // owned, since another thread may change the module
    weights.reserve(known_.size());
    for (const py::handle name : names_) {
      PyObject* const found = PyObject_GetItem(parameters, name.ptr());
      if (!found && PyErr_ExceptionMatches(PyExc_KeyError)) return PyErr_Clear(), false;
      weights.push_back(taken(found));
    }
    return hold(std::move(weights));
  }

  const std::shared_ptr<const Packed>& packed() const { return packed_; }
  const TensorLibrary& tensors() const { return *library_; }

 private:
  static std::vector<py::object> items(const py::tuple& tuple) {
    std::vector<py::object> items;
    for (const py::handle item : tuple) items.push_back(py::reinterpret_borrow<py::object>(item));
    return items;
  }

  bool hold(std::vector<py::object> weights) const {
    const Backend& backend = active_backend();
    if (packed_->kernels != backend.float32 && packed_->kernels != backend.float64) return false;
    if (weights.size() != known_.size() || !is_cacheable()) return false;
    return (!held_.empty() && are_unchanged(weights)) || fingerprint_of(std::move(weights)) == fingerprint_;
  }

  bool are_unchanged(const std::vector<py::object>& weights) const {
    for (std::size_t i = 0; i < known_.size(); ++i) {
      dlpack::Tensor found;
      if (!library_->look(weights[i].ptr(), found)) return false;
      if (!known_[i].is_unchanged(found, library_->version_of(weights[i].ptr()))) return false;
    }
    return true;
  }

  // A number for all bits of weights of the known layouts; none of others.
  std::optional<std::uint64_t> fingerprint_of(std::vector<py::object> weights) const {
    const Size operations = bytes_ / 8;
    dlpack::Tensor found;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (!library_->look(weights[i].ptr(), found)) return std::nullopt;
      if (!known_[i].has_layout_of(found))
        weights[i] = weights[i].attr("contiguous")();  // those with gaps are known by such a copy
      else if (operations >= gil_operations || !other_threads_wait)
        weights[i] = weights[i].attr("detach")();  // holds its memory while other threads are let in
    }
    std::vector<Memory> pieces;
    pieces.reserve(weights.size());
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (!library_->locate(weights[i].ptr(), found) || !known_[i].has_layout_of(found)) return std::nullopt;
      pieces.push_back(memory_of(found));
    }
    std::uint64_t fingerprint = 0;
    without_gil(operations,
                [&] { fingerprint = kernels_.fingerprint(pieces.data(), static_cast<Size>(pieces.size())); });
    return fingerprint;
  }

  std::shared_ptr<const TensorLibrary> library_;
  const Kernels& kernels_;  // whose fingerprints these are
  py::tuple names_;
  std::vector<KnownWeight> known_;
  std::vector<py::object> held_;  // the memory of a frozen module's, so that no other tensor comes to its address
  Size bytes_ = 0;
  std::optional<std::uint64_t> fingerprint_;
  std::shared_ptr<const Packed> packed_;
};

// ---- calls --------------------------------------------------------------------------------------------------------

constexpr int most_axes = 3;

struct Shape {
  std::int32_t axes;
  std::array<std::int64_t, most_axes> sizes;

  // -1: more than there can be
  Size elements() const {
    Size count = 1;
    for (std::int32_t i = 0; i < axes; ++i) {
      if (sizes[i] > 0 && count > PTRDIFF_MAX / 8 / sizes[i]) return -1;
      count *= sizes[i];
    }
    return count;
  }
};

// Memory for a tensor that is to be, which has half the cost of one from PyTorch; its description comes before it.
class NewTensor {
 public:
  NewTensor(const Shape& shape, dlpack::DataType dtype) {
    if (shape.elements() < 0) throw std::bad_alloc();
    Buffer memory(data_at + static_cast<std::size_t>(shape.elements() * (dtype.bits / 8)));
    block_.reset(new (memory.data()) Block{});
    block_->memory = std::move(memory);
    block_->shape = shape.sizes;
    Size stride = 1;
    for (std::int32_t i = shape.axes; i-- > 0; stride *= shape.sizes[i]) block_->strides[i] = stride;
    block_->owned.version = {dlpack::version_major, dlpack::version_minor};
    block_->owned.owner = block_.get();
    block_->owned.free = [](dlpack::Owned* self) { Free()(static_cast<Block*>(self->owner)); };
    block_->owned.tensor = {data(), {dlpack::cpu, 0}, shape.axes, dtype, block_->shape.data(), block_->strides.data(),
                            0};
  }

  void* data() const { return reinterpret_cast<char*>(block_.get()) + data_at; }

  // Once, when the numbers are there.
  py::object object(const TensorLibrary& library) {
    void* found = nullptr;
    if (library.api()->object_of(&block_.release()->owned, &found) != 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(found));
  }

 private:
  // At the beginning of its own memory.
  struct Block {
    dlpack::Owned owned;
    Buffer memory;
    std::array<std::int64_t, most_axes> shape, strides;
  };
  static constexpr std::size_t data_at = (sizeof(Block) + 63) / 64 * 64;
  struct Free {
    void operator()(Block* block) const {
      const Buffer memory = std::move(block->memory);
      block->~Block();
    }
  };

  std::unique_ptr<Block, Free> block_;
};

// Where x has its steps and its rows: cell [B, I], time_first [T, B, I], batch_first [B, T, I]; or without B.
enum class Order { cell, time_first, batch_first };

// What a call is, read from x.
struct Extent {
  Size steps = 1, batch = 1;
  Rows<const void*> x{};
  Shape output{};    // as x, of the output's units
  Shape state[2]{};  // h and c

  // Whether it is a call that can be.
  bool read(const TensorWeights& weights, PyObject* object, Order order) {
    const Packed& packed = *weights.packed();
    dlpack::Tensor found;
    if (!weights.tensors().look(object, found) || found.dtype.bits != 8 * packed.kernels->item_bytes) return false;
    if (!is_aligned(found)) return false;
    const std::int32_t unbatched = order == Order::cell ? 1 : 2, units = found.axes - 1;
    if (found.axes != unbatched && found.axes != unbatched + 1) return false;
    if (found.shape[units] != packed.input || (packed.input > 1 && found.strides[units] != 1)) return false;
    const bool has_batch = found.axes > unbatched;
    x = {found.data, 0, 0};
    if (order != Order::cell) {
      const int time = has_batch && order == Order::batch_first;
      steps = found.shape[time], x.step = found.strides[time];
    }
    if (has_batch) {
      const int row = order == Order::time_first;
      batch = found.shape[row], x.row = found.strides[row];
    }
    output.axes = found.axes;
    std::copy(found.shape, found.shape + units, output.sizes.begin());
    output.sizes[units] = packed.output();
    for (int i = 0; i < 2; ++i) {
      std::int32_t& axes = state[i].axes;
      if (order != Order::cell) state[i].sizes[axes++] = packed.layers * packed.directions;
      if (has_batch) state[i].sizes[axes++] = batch;
      state[i].sizes[axes++] = i == 0 ? packed.recurrent() : packed.hidden;
    }
    return steps > 0 && batch > 0 && output.elements() >= 0 && state[0].elements() >= 0 && state[1].elements() >= 0;
  }

  // A row of the output follows the one before it, or that of the next step does.
  Rows<void*> output_rows(void* data, Size units, Order order) const {
    return order == Order::batch_first ? Rows<void*>{data, units, steps * units}
                                       : Rows<void*>{data, batch * units, units};
  }
};

// The address of a contiguous tensor of that shape; else null.
const void* contiguous_at(const TensorWeights& weights, PyObject* object, const Shape& shape) {
  dlpack::Tensor found;
  if (!weights.tensors().look(object, found) || found.dtype.bits != 8 * weights.packed()->kernels->item_bytes)
    return nullptr;
  const bool is_like =
      found.axes == shape.axes && std::equal(found.shape, found.shape + found.axes, shape.sizes.begin());
  return is_like && is_contiguous(found) && is_aligned(found) ? found.data : nullptr;
}

// The state after of a cell, or of a layer output and state after; None where it is not the plain case.
py::object call_of(const TensorWeights& weights, PyObject* parameters, PyObject* x, PyObject* state, Order order) {
  const TensorLibrary& library = weights.tensors();
  const Packed& packed = *weights.packed();
  const bool is_cell = order == Order::cell, is_pair = packed.has_cell();
  require(!is_cell || (packed.layers == 1 && packed.directions == 1 && !packed.projection), "internal: not a cell");
  if (parameters != Py_None && (!PyDict_CheckExact(parameters) || library.is_busy())) return py::none();
  Extent extent;
  if (!extent.read(weights, x, order)) return py::none();
  const void* before[2] = {};
  if (state != Py_None) {
    if (is_pair && !(PyTuple_CheckExact(state) && PyTuple_GET_SIZE(state) == 2)) return py::none();
    for (int i = 0; i < 1 + is_pair; ++i) {
      before[i] = contiguous_at(weights, is_pair ? PyTuple_GET_ITEM(state, i) : state, extent.state[i]);
      if (!before[i]) return py::none();
    }
  }
  if (parameters != Py_None && !weights.hold(parameters)) return py::none();

  const dlpack::DataType dtype{dlpack::floating, static_cast<std::uint8_t>(8 * packed.kernels->item_bytes), 1};
  std::optional<NewTensor> output, after[2];
  if (!is_cell) output.emplace(extent.output, dtype);
  for (int i = 0; i < 1 + is_pair; ++i) after[i].emplace(extent.state[i], dtype);
  Forward call{};
  call.stack = packed.stack();
  call.steps = extent.steps;
  call.batch = extent.batch;
  call.input = extent.x;
  call.output = extent.output_rows((is_cell ? after[0] : output)->data(), packed.output(), order);
  call.hidden_before = before[0];
  call.cell_before = before[1];
  call.hidden_after = after[0]->data();
  call.cell_after = is_pair ? after[1]->data() : nullptr;
  const long most_threads = PyLong_AsLong(ask(library.threads).ptr());
  call.threads = static_cast<int>(std::clamp<long>(most_threads, 1, packed.threads(extent.steps, extent.batch)));
  run_forward(packed, call);

  py::object state_after = after[0]->object(library);
  if (is_pair) state_after = py::make_tuple(std::move(state_after), after[1]->object(library));
  return is_cell ? state_after : py::make_tuple(output->object(library), std::move(state_after));
}

// An uninitialised tensor of float32, float64 or bytes.
py::object empty(const TensorLibrary& library, const std::vector<Size>& sizes, Size item_bytes) {
  Shape shape{static_cast<std::int32_t>(sizes.size()), {}};
  require(sizes.size() <= most_axes && (item_bytes == 1 || item_bytes == 4 || item_bytes == 8) &&
              std::all_of(sizes.begin(), sizes.end(), [](Size size) { return size >= 0; }),
          "internal: no such tensor");
  std::copy(sizes.begin(), sizes.end(), shape.sizes.begin());
  const std::uint8_t code = item_bytes == 1 ? dlpack::unsigned_integer : dlpack::floating;
  return NewTensor(shape, {code, static_cast<std::uint8_t>(8 * item_bytes), 1}).object(library);
}

// The memory of a tensor as an array that owns it. PyTorch's own numpy() makes a storage one that cannot be resized.
py::array array_of(const TensorLibrary& library, const py::object& tensor) {
  dlpack::Tensor found;
  require(library.look(tensor.ptr(), found), "internal: a tensor that is not plain");
  const Size item_bytes = found.dtype.bits / 8;
  std::vector<py::ssize_t> shape(found.shape, found.shape + found.axes), strides;
  for (std::int32_t i = 0; i < found.axes; ++i) strides.push_back(found.strides[i] * item_bytes);
  return py::array(item_bytes == 4 ? py::dtype::of<float>() : py::dtype::of<double>(), shape, strides, found.data,
                   tensor);
}

// Of a plain C method, whose arguments are given.
template <class Call>
PyObject* answer(PyObject* self, Py_ssize_t count, Py_ssize_t expected, const Call& call) {
  const auto* weights = object_in<TensorWeights>(self);
  if (!weights || count != expected) {
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    return nullptr;
  }
  py::object result;
  const bool is_done = without_exceptions([&] { result = call(*weights); });
  return is_done ? result.release().ptr() : nullptr;
}

PyObject* step(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  return answer(self, count, 3, [&](const TensorWeights& weights) {
    return call_of(weights, given[0], given[1], given[2], Order::cell);
  });
}

PyObject* walk(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  return answer(self, count, 4, [&](const TensorWeights& weights) {
    const bool batch_first = is_true(py::reinterpret_borrow<py::object>(given[3]));
    return call_of(weights, given[0], given[1], given[2], batch_first ? Order::batch_first : Order::time_first);
  });
}

PyMethodDef methods[] = {
    {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)), METH_FASTCALL,
     "step($self, parameters, x, state, /)\n--\n\n"
     "The state after one step of a cell, or None where it is not the plain case. parameters: the module's by name, "
     "or\n"
     "None if they are known to be the present ones; x (B, I) or (I,); state (B, H) or (H,), of an LSTM two, or None."},
    {"walk", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(walk)), METH_FASTCALL,
     "walk($self, parameters, x, state, batch_first, /)\n--\n\n"
     "Output and state after of a layer, likewise. x (T, B, I), (B, T, I) or (T, I); state (L*D, B, .) or (L*D, .)."}};

}  // namespace

void bind_tensors(py::module_& module) {
  using namespace py::literals;
  py::class_<TensorLibrary, std::shared_ptr<TensorLibrary>>(module, "TensorLibrary", py::is_final())
      .def(py::init([](py::capsule exchange, py::object tensor, py::object parameter, py::object is_negative,
                       py::object threads, py::tuple busy) {
             TensorLibrary library{std::move(exchange),    std::move(tensor),  std::move(parameter),
                                   std::move(is_negative), std::move(threads), std::move(busy)};
             const dlpack::ExchangeApi* api = library.api();
             if (!api) throw py::error_already_set();
             require(api->version.major == dlpack::version_major && api->look && api->object_of,
                     "internal: another DLPack");
             return library;
           }),
           "exchange"_a, "tensor"_a, "parameter"_a, "is_negative"_a, "threads"_a, "busy"_a)
      .def("empty", empty, "shape"_a, "item_bytes"_a)
      .def("array", array_of, "tensor"_a);
  py::class_<TensorWeights> weights(module, "TensorWeights", py::is_final());
  weights
      .def(py::init<std::shared_ptr<const TensorLibrary>, py::tuple, const py::tuple&, const py::function&, bool>(),
           py::arg("library").none(false), "names"_a, "weights"_a, "pack"_a, "is_frozen"_a)
      .def("hold", py::overload_cast<const py::tuple&>(&TensorWeights::hold, py::const_), "weights"_a)
      .def_property_readonly("is_cacheable", &TensorWeights::is_cacheable)
      .def_property_readonly("packed", &TensorWeights::packed);
  // As of a stream: plain C methods.
  for (PyMethodDef& method : methods)
    weights.attr(method.ml_name) =
        py::reinterpret_steal<py::object>(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(weights.ptr()), &method));
}

}  // namespace gatewise
