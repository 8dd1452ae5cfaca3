// PyTorch's tensors: weights that were packed and are known again, and the step of a cell. A step takes a few
// microseconds, and asking seven tensors from Python what they are would take as long again. So they are looked at
// here, by DLPack's exchange interface, without compiling against PyTorch; what is not the plain case is left to
// Python.
#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "dlpack.hpp"
#include "method.hpp"

namespace gatewise {
namespace {

// Calls with so many rows (steps times batch) look at all weights before they use packed ones: it costs as much as
// multiplying some 8 rows by them.
constexpr Size rows_to_look = 64;

// ---- Python ---------------------------------------------------------------------------------------------------------

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

// ---- what PyTorch is asked ------------------------------------------------------------------------------------------

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

  // Whether it is a dense tensor of float32 or float64 in this process's memory; `found` says where.
  bool look(PyObject* object, dlpack::Tensor& found) const {
    const auto* kind = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (kind != tensor.ptr() && kind != parameter.ptr()) return false;
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
    return !is_true(ask(is_negative, object));
  }

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

// ---- weights
// ----------------------------------------------------------------------------------------------------------

// A number that changes whenever a byte does, but for one case in 2^64 or so. As fast as memory is read.
std::uint64_t fingerprint(const void* memory, std::size_t bytes) {
  constexpr int lanes = 4;
  constexpr std::uint64_t factor[lanes] = {0x9E3779B97F4A7C15u, 0xBF58476D1CE4E5B9u, 0x94D049BB133111EBu,
                                           0xD6E8FEB86659FD93u};
  std::uint64_t sum[lanes] = {bytes, 1, 2, 3}, words[lanes] = {};
  const char* data = static_cast<const char*>(memory);
  for (std::size_t done = 0; done < bytes; done += sizeof words) {
    const std::size_t left = bytes - done;
    if (left < sizeof words) std::memset(words, 0, sizeof words);
    std::memcpy(words, data + done, left < sizeof words ? left : sizeof words);
    for (int i = 0; i < lanes; ++i) sum[i] = (sum[i] ^ words[i]) * factor[i], sum[i] ^= sum[i] >> 29;
  }
  std::uint64_t all = 0;
  for (int i = 0; i < lanes; ++i) all = (all ^ sum[i]) * factor[lanes - 1 - i], all ^= all >> 32;
  return all;
}

// What one weight is known by. `memory` is kept, so that no other tensor can come to its address.
struct Seen {
  py::object memory;
  const void* data;
  std::int64_t version;
  std::vector<std::int64_t> extent;  // bits, shape, strides

  bool is(const dlpack::Tensor& tensor) const {
    const auto axes = static_cast<std::size_t>(tensor.axes);
    return data == tensor.data && extent.size() == 2 * axes + 1 && extent[0] == tensor.dtype.bits &&
           std::equal(tensor.shape, tensor.shape + axes, extent.begin() + 1) &&
           std::equal(tensor.strides, tensor.strides + axes, extent.begin() + 1 + tensor.axes);
  }
};

// Weights of a module, packed, and by what they are known to be the present ones: an address and a version tell of
// optimizers, in-place changes and moves; not of writes past PyTorch, so that calls which are long enough also compare
// the numbers.
class TensorWeights {
 public:
  TensorWeights(std::shared_ptr<const TensorLibrary> library, const py::tuple& weights, const py::function& pack)
      : library_(std::move(library)), fingerprint_(fingerprint_of(weights)) {
    for (const py::handle weight : weights) {
      dlpack::Tensor found;
      require(library_->look(weight.ptr(), found), "internal: weights that are not plain");
      std::vector<std::int64_t> extent{found.dtype.bits};
      extent.insert(extent.end(), found.shape, found.shape + found.axes);
      extent.insert(extent.end(), found.strides, found.strides + found.axes);
      seen_.push_back({weight.attr("detach")(), found.data, library_->version_of(weight.ptr()), std::move(extent)});
    }
    packed_ = pack(weights).cast<std::shared_ptr<const Packed>>();
  }

  // Whether a later call may find that these are the present ones.
  bool can_last() const {
    return std::all_of(seen_.begin(), seen_.end(), [](const Seen& one) { return one.version >= 0; });
  }

  // Whether they are, for a call of so many rows.
  bool hold(const py::tuple& weights, Size rows) const {
    const Backend& backend = active_backend();
    if (packed_->kernels != backend.float32 && packed_->kernels != backend.float64) return false;
    if (weights.size() != seen_.size() || !can_last()) return false;
    for (std::size_t i = 0; i < seen_.size(); ++i) {
      PyObject* weight = PyTuple_GET_ITEM(weights.ptr(), static_cast<Py_ssize_t>(i));
      dlpack::Tensor found;
      if (!library_->look(weight, found) || !seen_[i].is(found) || library_->version_of(weight) != seen_[i].version)
        return false;
    }
    return rows < rows_to_look || fingerprint_of(weights) == fingerprint_;
  }

  const std::shared_ptr<const Packed>& packed() const { return packed_; }
  const TensorLibrary& library() const { return *library_; }

 private:
  std::uint64_t fingerprint_of(const py::tuple& weights) const {
    std::uint64_t all = 0;
    for (const py::handle weight : weights) {
      const py::object dense = weight.attr("contiguous")();
      dlpack::Tensor found;
      require(library_->look(dense.ptr(), found), "internal: weights that are not plain");
      Size bytes = found.dtype.bits / 8;
      for (std::int32_t i = 0; i < found.axes; ++i) bytes *= found.shape[i];
      std::uint64_t own = 0;
      without_gil(bytes, [&] { own = fingerprint(found.data, static_cast<std::size_t>(bytes)); });
      all = all * 0x9E3779B97F4A7C15u + own;
    }
    return all;
  }

  std::shared_ptr<const TensorLibrary> library_;
  std::vector<Seen> seen_;
  std::uint64_t fingerprint_;
  std::shared_ptr<const Packed> packed_;
};

// ---- the step of a cell
// -----------------------------------------------------------------------------------------------

// What [B, units], or [units] without a batch, has besides its units.
struct Extent {
  std::int32_t axes;
  Size batch;
};

Extent extent_of(const dlpack::Tensor& tensor) { return {tensor.axes, tensor.axes == 2 ? tensor.shape[0] : 1}; }

// The address of a contiguous tensor of the cell's dtype, of `units` and, if one is given, of that extent; else null.
void* plain_rows(const TensorWeights& weights, PyObject* object, Size units, const Extent* extent,
                 dlpack::Tensor& found) {
  if (!weights.library().look(object, found) || found.dtype.bits != 8 * weights.packed()->kernels->item_bytes)
    return nullptr;
  if (found.axes < 1 || found.axes > 2 || found.shape[found.axes - 1] != units || !is_contiguous(found)) return nullptr;
  const auto [axes, batch] = extent_of(found);
  return !extent || (axes == extent->axes && batch == extent->batch) ? found.data : nullptr;
}

// Memory for a tensor that is to be, which has half the cost of one from PyTorch: [B, units], or [units], with its
// description before it.
class NewTensor {
 public:
  NewTensor(const Extent& extent, Size units, Size item_bytes) {
    const auto bytes = static_cast<std::size_t>(extent.batch * units * item_bytes);
    block_.reset(new (::operator new(data_at + bytes, alignment)) Block{});
    dlpack::Owned& owned = block_->owned;
    owned.version = {dlpack::version_major, dlpack::version_minor};
    owned.owner = block_.get();
    owned.free = [](dlpack::Owned* self) { Free()(static_cast<Block*>(self->owner)); };
    const bool has_batch = extent.axes == 2;
    block_->shape = {has_batch ? extent.batch : units, units};
    block_->strides = {has_batch ? units : 1, 1};
    owned.tensor = {data(),
                    {dlpack::cpu, 0},
                    extent.axes,
                    {dlpack::floating, static_cast<std::uint8_t>(8 * item_bytes), 1},
                    block_->shape.data(),
                    block_->strides.data(),
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
  struct Block {
    dlpack::Owned owned;
    std::array<std::int64_t, 2> shape, strides;
  };
  static constexpr std::align_val_t alignment{64};
  static constexpr std::size_t data_at = (sizeof(Block) + 63) / 64 * 64;
  struct Free {
    void operator()(Block* block) const { ::operator delete(block, alignment); }
  };

  std::unique_ptr<Block, Free> block_;
};

// The state after, or None where PyTorch's own cell must say what it is.
py::object step_of(const TensorWeights& weights, PyObject* present, PyObject* x, PyObject* state) {
  const TensorLibrary& library = weights.library();
  const Packed& packed = *weights.packed();
  require(packed.layers == 1 && packed.directions == 1 && !packed.projection, "internal: not a cell");
  const bool is_pair = packed.has_cell();
  const int parts = 1 + is_pair;
  if (is_pair && !(PyTuple_CheckExact(state) && PyTuple_GET_SIZE(state) == 2)) return py::none();
  PyObject* const before[2] = {is_pair ? PyTuple_GET_ITEM(state, 0) : state,
                               is_pair ? PyTuple_GET_ITEM(state, 1) : nullptr};
  const void* before_at[2] = {};

  dlpack::Tensor found;
  const void* x_at = plain_rows(weights, x, packed.input, nullptr, found);
  if (!x_at) return py::none();
  const Extent extent = extent_of(found);
  for (int i = 0; i < parts; ++i)
    if (!(before_at[i] = plain_rows(weights, before[i], packed.hidden, &extent, found))) return py::none();
  if (present != Py_None) {
    if (!PyTuple_CheckExact(present) || library.is_busy()) return py::none();
    if (!weights.hold(py::reinterpret_borrow<py::tuple>(present), extent.batch)) return py::none();
  }
  std::optional<NewTensor> after[2];
  for (int i = 0; i < parts; ++i) after[i].emplace(extent, packed.hidden, packed.kernels->item_bytes);

  Forward call{};
  call.stack = packed.stack();
  call.steps = 1;
  call.batch = extent.batch;
  call.input = {x_at, 0, packed.input};
  call.hidden_before = before_at[0];
  call.cell_before = before_at[1];
  call.output = {after[0]->data(), 0, packed.hidden};
  call.hidden_after = after[0]->data();
  call.cell_after = is_pair ? after[1]->data() : nullptr;
  const long most_threads = PyLong_AsLong(ask(library.threads).ptr());
  call.threads = static_cast<int>(std::clamp<long>(most_threads, 1, packed.threads(1, extent.batch)));
  run_forward(packed, call);
  py::object hidden = after[0]->object(library);
  return is_pair ? py::make_tuple(std::move(hidden), after[1]->object(library)) : hidden;
}

PyObject* step(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  const auto* weights = object_in<TensorWeights>(self);
  if (!weights || count != 3) {
    PyErr_SetString(PyExc_TypeError, "step: expected step(weights, x, state)");
    return nullptr;
  }
  try {
    return step_of(*weights, arguments[0], arguments[1], arguments[2]).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef step_definition = {
    "step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)), METH_FASTCALL,
    "step($self, weights, x, state, /)\n--\n\n"
    "One step of a cell: the state after, or None where it is not the plain case. weights: those of the module, or "
    "None\n"
    "if they were packed just now; x (B, I) or (I,); state (B, H) or (H,), of an LSTM a tuple of two."};

}  // namespace

void bind_tensors(py::module_& module) {
  using namespace py::literals;
  py::class_<TensorLibrary, std::shared_ptr<TensorLibrary>>(module, "TensorLibrary")
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
           "exchange"_a, "tensor"_a, "parameter"_a, "is_negative"_a, "threads"_a, "busy"_a);
  py::class_<TensorWeights> weights(module, "TensorWeights");
  weights
      .def(py::init<std::shared_ptr<const TensorLibrary>, const py::tuple&, const py::function&>(), "library"_a,
           "weights"_a, "pack"_a)
      .def("hold", &TensorWeights::hold, "weights"_a, "rows"_a)
      .def_property_readonly("can_last", &TensorWeights::can_last)
      .def_property_readonly("packed", &TensorWeights::packed);
  // As of a stream: a plain C method.
  weights.attr("step") = py::reinterpret_steal<py::object>(
      PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(weights.ptr()), &step_definition));
}

}  // namespace gatewise
