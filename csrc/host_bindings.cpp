// gflowgr._host: the host-side parts for Python, NumPy in and out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "tree_build.h"

namespace py = pybind11;

namespace {

const char* name_of(gflowgr::TreeFault fault) {
  switch (fault) {
    case gflowgr::TreeFault::empty:
      return "empty";
    case gflowgr::TreeFault::hole:
      return "hole";
    default:
      return "token";
  }
}

// (buffer, None), or (None, (kind, row, column)) for the first bad identifier.
py::tuple build_tree(const py::array& tokens, const py::object& items, int index_bytes) {
  const bool narrow = py::isinstance<py::array_t<int32_t>>(tokens);
  if (!narrow && !py::isinstance<py::array_t<int64_t>>(tokens)) {
    throw py::type_error("tokens: expected int32 or int64");
  }
  if (tokens.ndim() != 2 || tokens.shape(0) < 1 || tokens.shape(1) < 1 ||
      tokens.shape(0) > INT32_MAX || !(tokens.flags() & py::array::c_style)) {
    throw py::value_error("tokens: expected a C-contiguous array [rows, L] with rows");
  }
  if (index_bytes != 0 && index_bytes != 4 && index_bytes != 8) {
    throw py::value_error("index_bytes: expected 0, 4 or 8");
  }
  gflowgr::TreeInput input;
  input.tokens = tokens.data();
  input.token_bytes = narrow ? 4 : 8;
  input.rows = tokens.shape(0);
  input.columns = tokens.shape(1);
  input.index_bytes = index_bytes;
  py::array_t<int64_t, py::array::c_style> ids;
  if (!items.is_none()) {
    if (!py::isinstance<py::array_t<int64_t>>(items)) throw py::type_error("items: expected int64");
    ids = py::reinterpret_borrow<py::array_t<int64_t, py::array::c_style>>(items);
    if (ids.ndim() != 1 || ids.shape(0) != input.rows || !(ids.flags() & py::array::c_style)) {
      throw py::value_error("items: expected a C-contiguous array [rows]");
    }
    input.items = ids.data();
  }
  gflowgr::TreeError error;
  gflowgr::TreeBuffer buffer;
  {
    py::gil_scoped_release release;
    buffer = gflowgr::build_tree(input, &error);
  }
  if (error.fault != gflowgr::TreeFault::none) {
    return py::make_tuple(py::none(), py::make_tuple(name_of(error.fault), error.row, error.column));
  }
  const auto bytes = static_cast<py::ssize_t>(buffer.size());
  uint8_t* const data = buffer.release();
  py::capsule owner(data, [](void* memory) { gflowgr::TreeBuffer::free(memory); });
  return py::make_tuple(py::array_t<uint8_t>({bytes}, {1}, data, owner), py::none());
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Host-side parts of gflowgr in C++.";
  module.def("build_tree", &build_tree, py::arg("tokens"), py::arg("items"), py::arg("index_bytes"));
}
