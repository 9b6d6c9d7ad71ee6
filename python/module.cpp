// SPDX-License-Identifier: Apache-2.0
//
// `rom._C` and `rom._C_cuda`: every registered kernel as a function of keyword arguments. A tensor is anything with
// data_ptr(), shape, stride() and dtype, so no torch header is needed; None is an argument that is not given.
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <unordered_map>

#include "core/status.hpp"
#include "kernels.hpp"

namespace py = pybind11;

namespace rom {
std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}
}  // namespace rom

namespace {

// dtype object -> rom_dtype, told once by rom.native; leaked on purpose (no Python calls at exit).
std::unordered_map<PyObject*, int>& dtypes() {
  static auto* map = new std::unordered_map<PyObject*, int>;
  return *map;
}

py::object attribute(py::handle object, const char* name) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttrString(object.ptr(), name));
}

rom_tensor view(py::handle tensor, const char* name) {
  rom_tensor out{};
  if (tensor.is_none()) return out;
  const py::object shape = attribute(tensor, "shape"), stride = tensor.attr("stride")();
  const auto dtype = dtypes().find(attribute(tensor, "dtype").ptr());
  const Py_ssize_t ndim = PyTuple_Size(shape.ptr());
  if (dtype == dtypes().end() || ndim > ROM_MAX_NDIM)
    throw py::type_error(std::string(name) + ": a tensor of this dtype or of more than 4 dimensions cannot be passed");
  out.data = reinterpret_cast<void*>(PyLong_AsSize_t(tensor.attr("data_ptr")().ptr()));
  out.ndim = static_cast<int32_t>(ndim);
  out.dtype = dtype->second;
  for (Py_ssize_t i = 0; i < ndim; ++i) {
    out.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
    out.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
  }
  return out;
}

class Call {
 public:
  explicit Call(const rom::Kernel& kernel) : kernel_(kernel) {
    for (const auto& field : kernel.fields) by_name_.emplace(field.name, &field);
  }

  std::vector<char> pack(const py::kwargs& values) const {
    std::vector<char> args(kernel_.args_bytes, 0);
    auto& launch = *reinterpret_cast<rom_launch*>(args.data() + kernel_.launch_offset);
    launch.threads = 1;
    for (const auto& [key, value] : values) {
      const char* name = PyUnicode_AsUTF8(key.ptr());
      if (!std::strcmp(name, "threads")) {
        launch.threads = value.cast<int64_t>();
      } else if (!std::strcmp(name, "stream")) {
        launch.stream = reinterpret_cast<void*>(value.cast<uintptr_t>());
      } else {
        set(args.data(), name, value);
      }
    }
    return args;
  }

  void run(const py::kwargs& values) const {
    const std::vector<char> args = pack(values);
    rom_clear_error();
    rom_status status;
    {
      py::gil_scoped_release unlocked;
      status = kernel_.run(args.data());
    }
    if (status != ROM_OK) fail(values);
  }

  int64_t workspace(const py::kwargs& values) const { return kernel_.workspace(pack(values).data()); }

 private:
  void set(char* args, const char* name, py::handle value) const {
    const auto found = by_name_.find(name);
    if (found == by_name_.end()) throw py::type_error(std::string(kernel_.name) + ": no argument named " + name);
    char* at = args + found->second->offset;
    switch (found->second->kind) {
      case rom::Kind::tensor: *reinterpret_cast<rom_tensor*>(at) = view(value, name); break;
      case rom::Kind::integer: *reinterpret_cast<int64_t*>(at) = value.cast<int64_t>(); break;
      case rom::Kind::real: *reinterpret_cast<double*>(at) = value.cast<double>(); break;
    }
  }

  [[noreturn]] void fail(const py::kwargs& values) const {
    std::string shapes;
    for (const auto& [key, value] : values)
      if (py::hasattr(value, "shape"))
        shapes += (shapes.empty() ? "" : ", ") + py::str(key).cast<std::string>() + " " +
                  py::str(py::tuple(value.attr("shape"))).cast<std::string>();
    throw std::runtime_error(std::string("rom kernel ") + kernel_.name + " failed: " + rom_last_error() + " [" +
                             shapes + "]");
  }

  const rom::Kernel& kernel_;
  std::unordered_map<std::string, const rom::Field*> by_name_;
};

}  // namespace

PYBIND11_MODULE(ROM_MODULE_NAME, m) {
  m.attr("abi_version") = ROM_ABI_VERSION;
#ifdef ROM_CPU_MODULE
  m.def("cpu_isa", &rom_cpu_isa);
#endif
  m.def("set_dtypes", [](const py::dict& codes) {
    for (const auto& [dtype, code] : codes) dtypes()[dtype.inc_ref().ptr()] = code.cast<int>();
  });
  py::list names;
  for (const auto& kernel : rom::kernels()) {
    auto* call = new Call(kernel);  // lives as long as the module
    m.def(kernel.name, [call](const py::kwargs& values) { call->run(values); });
    if (kernel.workspace)
      m.def((std::string(kernel.name) + "_workspace").c_str(),
            [call](const py::kwargs& v) { return call->workspace(v); });
    names.append(kernel.name);
  }
  m.attr("kernels") = py::tuple(names);
}
