// Long calls: they let other Python threads run, handle signals meanwhile, and survive the end of the interpreter.
#pragma once

#include <cfenv>
#include <chrono>
#include <type_traits>

#include "../core/contract.hpp"
#include "pybind.hpp"

namespace gatewise {

// For calls of less than about 5 us, releasing the GIL costs more than it gains.
constexpr Size gil_operations = 128 * 1024;

// Releases the GIL. On the main thread, where Python handles signals, it takes the GIL again now and then to handle the
// signals that have come; if a handler raises, the call is asked to end.
class WithoutGil : private Interrupt {
 public:
  WithoutGil();
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  Interrupt* interrupt() { return this; }
  // Takes the GIL again: to be called once, before this is destroyed. The destructor does not do it, since a thread
  // that asks for the GIL while the interpreter is finalised never returns.
  void take_back();
  // Whether a handler has raised. Its exception is then the present one.
  bool has_raised() const { return asked; }

 private:
  using Clock = std::chrono::steady_clock;
  void handle_signals();

  PyThreadState* state_;
  Clock::time_point next_look_;
  std::fenv_t callers_mode_;
};

// Whether this thread is the one on which Python handles signals.
bool is_main_thread();
void find_main_thread();  // once, at import

// Calls work(interrupt), or work(), which does about `operations` multiply-adds. A long call runs without the GIL and
// gets an interrupt to look at; a short one gets null. Throws what a signal's handler raised.
template <class Work>
void without_gil(Size operations, const Work& work) {
  const auto call = [&](Interrupt* interrupt) {
    if constexpr (std::is_invocable_v<const Work&, Interrupt*>)
      work(interrupt);
    else
      work();
  };
  if (operations < gil_operations) return call(nullptr);
  WithoutGil released;
  try {
    call(released.interrupt());
  } catch (...) {
    released.take_back();
    throw;
  }
  released.take_back();
  if (released.has_raised()) throw py::error_already_set();
}

}  // namespace gatewise
