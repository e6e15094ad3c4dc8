#include "module.h"

#include <exception>

#include "attention/units.h"

namespace {

using convit_kernels::Unit;

PyObject* instruction_set(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(convit_kernels::unit().name);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// Adds an object to a list, and gives up its reference; false where either could not be made.
bool append(PyObject* list, PyObject* object) {
  const bool added = list != nullptr && object != nullptr && PyList_Append(list, object) == 0;
  Py_XDECREF(object);
  return added;
}

PyObject* instruction_sets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Unit* unit : convit_kernels::units()) {
    if (!append(names, PyUnicode_FromString(unit->name))) {
      Py_XDECREF(names);
      return nullptr;
    }
  }
  return names;
}

PyObject* units_by_dtype(PyObject*, PyObject*) {
  try {
    const Unit& unit = convit_kernels::unit();
    const auto name = [&](convit_kernels::Dtype dtype) { return convit_kernels::unit_for(unit, dtype).name; };
    return Py_BuildValue(
        "{s:s,s:s,s:s,s:s}", "float32", name(convit_kernels::kFloat32), "float64", name(convit_kernels::kFloat64),
        "bfloat16", name(convit_kernels::kBFloat16), "float16", name(convit_kernels::kFloat16));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "The instruction set of the attention's kernels in use."},
    {"instruction_sets", instruction_sets, METH_NOARGS, "Those that this processor runs, the fastest first."},
    {"units_by_dtype", units_by_dtype, METH_NOARGS, "The instruction set whose kernels serve each dtype."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

CONVIT_KERNELS_DEFINE_MODULE(_C, methods)
