// The table of contents of gatewise._core. Arguments are checked, and errors explained, in Python; the core checks only
// what keeps memory safe.
#define GATEWISE_IMPORTS_NUMPY
#include "interruption.hpp"
#include "pybind.hpp"

namespace gatewise {

void bind_settings(py::module_& module);
void bind_schedules(py::module_& module);
void bind_packed(py::module_& module);
void bind_tapes(py::module_& module);
void bind_networks(py::module_& module);
void bind_streams(py::module_& module);
void bind_pools(py::module_& module);
void bind_foreign(py::module_& module);
void bind_tensors(py::module_& module);
void bind_xla(py::module_& module);

namespace {

// Without this, pybind11 would allocate an instance whose __init__ never ran as soon as one of its methods is called,
// and the method would read memory that nobody wrote to.
void refuse_uninitialised_instances(const py::module_& module) {
  for (const auto& [name, value] : module.attr("__dict__").cast<py::dict>())
    if (PyType_Check(value.ptr()))
      py::detail::get_type_info(reinterpret_cast<PyTypeObject*>(value.ptr()))->operator_new = [](std::size_t) -> void* {
        throw py::type_error("an instance of gatewise._core that was not initialised");
      };
}

}  // namespace
}  // namespace gatewise

PYBIND11_MODULE(_core_of_main_interpreter, module, pybind11::mod_gil_not_used()) {
  if (_import_array() < 0) throw pybind11::error_already_set();
  gatewise::find_main_thread();
  gatewise::bind_settings(module);
  gatewise::bind_schedules(module);
  gatewise::bind_packed(module);
  gatewise::bind_tapes(module);
  gatewise::bind_networks(module);
  gatewise::bind_streams(module);
  gatewise::bind_pools(module);
  gatewise::bind_foreign(module);
  gatewise::bind_tensors(module);
  gatewise::bind_xla(module);
  gatewise::refuse_uninitialised_instances(module);
}

// In a subinterpreter pybind11 would wait for a lock that its own thread holds, before it calls anything here.
extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
  if (PyInterpreterState_Get() == PyInterpreterState_Main()) return PyInit__core_of_main_interpreter();
  PyErr_SetString(PyExc_ImportError, "gatewise cannot be imported in a subinterpreter, only in the main one");
  return nullptr;
}
