// The names by which Python asks for a cell, an activation or an operation.
#pragma once

#include <string>
#include <tuple>

#include "../core/contract.hpp"

namespace gatewise {

Cell cell_of(const std::string& name);

// Name, alpha and beta.
using NamedFunction = std::tuple<std::string, double, double>;
Function function_of(const NamedFunction& function);

Operation operation_of(const std::string& name);

}  // namespace gatewise
