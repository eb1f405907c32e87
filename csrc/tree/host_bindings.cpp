// gflowgr._host: building and checking the tree, for Python; NumPy arrays in and out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "tree/tree_build.h"
#include "tree/tree_check.h"
#include "tree/tree_layout.h"

namespace py = pybind11;

namespace {

const char* name_of(gflowgr::TreeFault fault) {
  switch (fault) {
    case gflowgr::TreeFault::empty:
      return "empty";
    case gflowgr::TreeFault::hole:
      return "hole";
    case gflowgr::TreeFault::present:
      return "present";
    case gflowgr::TreeFault::absent:
      return "absent";
    case gflowgr::TreeFault::nothing:
      return "nothing";
    default:
      return "token";
  }
}

// A C-contiguous int64 array [rows].
const int64_t* ids_of(const py::object& ids, const char* name, py::ssize_t rows) {
  if (!py::isinstance<py::array_t<int64_t>>(ids)) throw py::type_error(std::string(name) + " must be int64");
  const auto array = py::reinterpret_borrow<py::array>(ids);
  if (array.ndim() != 1 || array.shape(0) != rows || !(array.flags() & py::array::c_style)) {
    throw py::value_error(std::string(name) + " must be a C-contiguous array [rows]");
  }
  return static_cast<const int64_t*>(array.data());
}

// Reads tokens [rows, L] and items [rows] or None; the result points into both.
gflowgr::TreeInput input_of(const py::array& tokens, const py::object& items, bool some) {
  const bool narrow = py::isinstance<py::array_t<int32_t>>(tokens);
  if (!narrow && !py::isinstance<py::array_t<int64_t>>(tokens)) {
    throw py::type_error("tokens must be int32 or int64");
  }
  if (tokens.ndim() != 2 || (some && tokens.shape(0) < 1) || tokens.shape(1) < 1 ||
      tokens.shape(0) > INT32_MAX || !(tokens.flags() & py::array::c_style)) {
    throw py::value_error("tokens must be a C-contiguous array [rows, L] with rows");
  }
  gflowgr::TreeInput input;
  input.tokens = tokens.data();
  input.token_bytes = narrow ? 4 : 8;
  input.rows = tokens.shape(0);
  input.columns = tokens.shape(1);
  if (!items.is_none()) input.items = ids_of(items, "items", input.rows);
  return input;
}

// (buffer, None), or (None, (kind, row, column)) of the first fault.
py::tuple result_of(gflowgr::TreeBuffer buffer, const gflowgr::TreeError& error) {
  if (error.fault != gflowgr::TreeFault::none) {
    return py::make_tuple(py::none(), py::make_tuple(name_of(error.fault), error.row, error.column));
  }
  const auto bytes = static_cast<py::ssize_t>(buffer.size());
  uint8_t* const data = buffer.release();
  py::capsule owner(data, [](void* memory) { gflowgr::TreeBuffer::free(memory); });
  return py::make_tuple(py::array_t<uint8_t>({bytes}, {1}, data, owner), py::none());
}

py::tuple build_tree(const py::array& tokens, const py::object& items, int index_bytes) {
  if (index_bytes != 0 && index_bytes != 4 && index_bytes != 8) {
    throw py::value_error("index_bytes must be 0, 4 or 8");
  }
  gflowgr::TreeInput input = input_of(tokens, items, true);
  input.index_bytes = index_bytes;
  gflowgr::TreeError error;
  gflowgr::TreeBuffer buffer;
  {
    py::gil_scoped_release release;
    buffer = gflowgr::build_tree(input, &error);
  }
  return result_of(std::move(buffer), error);
}

// A tree's buffer whose header was checked.
const uint8_t* tree_of(const py::array& tree) {
  if (!py::isinstance<py::array_t<uint8_t>>(tree) || tree.ndim() != 1 || !(tree.flags() & py::array::c_style)) {
    throw py::type_error("tree must be a contiguous array of uint8");
  }
  const auto* const data = static_cast<const uint8_t*>(tree.data());
  if (gflowgr::tree_total_bytes(data, tree.shape(0)) != tree.shape(0)) {
    throw py::value_error("tree: not the buffer of a prefix tree, or one of another format or size");
  }
  return data;
}

std::vector<int64_t> check_tree(const py::array& tree) {
  const uint8_t* const data = tree_of(tree);
  const py::gil_scoped_release release;
  return gflowgr::check_tree(data);
}

// items and removed: distinct ids from 0.
py::tuple update_tree(const py::array& tree, const py::array& tokens, const py::object& items,
                      const py::object& removed) {
  const gflowgr::TreeInput input = input_of(tokens, items, false);
  if (input.items == nullptr) throw py::value_error("items must be int64 [rows]");
  const uint8_t* const old = tree_of(tree);
  const py::ssize_t num_removed = py::len(removed);
  const int64_t* const gone = ids_of(removed, "removed", num_removed);
  gflowgr::TreeError error;
  gflowgr::TreeBuffer buffer;
  {
    py::gil_scoped_release release;
    buffer = gflowgr::update_tree(old, input, gone, num_removed, &error);
  }
  return result_of(std::move(buffer), error);
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Host-side parts of gflowgr in C++.";
  module.def("build_tree", &build_tree, py::arg("tokens"), py::arg("items"), py::arg("index_bytes"));
  module.def("check_tree", &check_tree, py::arg("tree"));
  module.def("update_tree", &update_tree, py::arg("tree"), py::arg("tokens"), py::arg("items"),
             py::arg("removed"));
}
