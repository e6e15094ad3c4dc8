#include "module.h"

#include <exception>

#include "attention/instruction_set.h"

namespace {

PyObject* instruction_set(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(convit_kernels::instruction_set().name);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* instruction_sets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const convit_kernels::InstructionSet& set : convit_kernels::instruction_sets()) {
    PyObject* name = names == nullptr ? nullptr : PyUnicode_FromString(set.name);
    if (name == nullptr || PyList_Append(names, name) != 0) {
      Py_XDECREF(name);
      Py_XDECREF(names);
      return nullptr;
    }
    Py_DECREF(name);
  }
  return names;
}

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "The instruction set of the attention's kernels in use."},
    {"instruction_sets", instruction_sets, METH_NOARGS, "Those that this processor runs, the fastest first."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

CONVIT_KERNELS_DEFINE_MODULE(_C, methods)
