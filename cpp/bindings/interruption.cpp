#include "interruption.hpp"

#include <algorithm>
#include <atomic>

#include "../core/forks.hpp"

#if defined(__GLIBC__)
#include <cxxabi.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#endif

namespace gatewise {
namespace {

using std::chrono::milliseconds;

// A look for signals costs 0.3 us while no other Python thread runs, but up to 5 ms, the interval at which Python
// switches threads, while one does. Looks may take a twentieth of the time, and must not be more than 100 ms apart.
constexpr auto min_pause = milliseconds(10), max_pause = milliseconds(90);
constexpr int pauses_of_a_look = 20;

std::atomic<unsigned long> main_thread{0};

// Up to Python 3.13, a thread that asks for the GIL while the interpreter is finalised is ended by pthread_exit, which
// unwinds its frames and runs destructors that use Python without the GIL. Here the thread stops for good instead, as
// Python itself lets it do since 3.14.
void take_gil(PyThreadState* state) {
#if PY_VERSION_HEX < 0x030E0000 && defined(__GLIBC__)
  try {
    PyEval_RestoreThread(state);
  } catch (abi::__forced_unwind&) {
    for (;;) pause();
  }
#else
  PyEval_RestoreThread(state);
#endif
}

}  // namespace

void find_main_thread() {
  // Up to Python 3.12, only `threading` knows the main thread: the one that imported `threading` first.
  const py::module_ thread = py::module_::import("_thread");
  main_thread = (py::hasattr(thread, "_get_main_thread_ident")
                     ? thread.attr("_get_main_thread_ident")()
                     : py::module_::import("threading").attr("main_thread")().attr("ident"))
                    .cast<unsigned long>();
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { main_thread = PyThread_get_thread_ident(); });
#endif
}

bool is_main_thread() { return PyThread_get_thread_ident() == main_thread.load(std::memory_order_relaxed); }

WithoutGil::WithoutGil() : Interrupt{}, next_look_(), callers_mode_() {
  if (is_main_thread()) {
    std::fegetenv(&callers_mode_);
    next_look_ = Clock::now() + min_pause;
    look = [](Interrupt& interrupt) {
      auto& self = static_cast<WithoutGil&>(interrupt);
      if (!self.asked && Clock::now() >= self.next_look_) self.handle_signals();
    };
  }
  state_ = PyEval_SaveThread();
}

void WithoutGil::take_back() { take_gil(state_); }

// Signal handlers are Python, and run in the caller's floating-point mode.
void WithoutGil::handle_signals() {
  const Clock::time_point begin = Clock::now();
  std::fenv_t cores_mode;
  std::fegetenv(&cores_mode);
  std::fesetenv(&callers_mode_);
  take_gil(state_);
  const std::uint32_t forks_before = forks();
  if (PyErr_CheckSignals() < 0) __atomic_store_n(&asked, 1, __ATOMIC_RELEASE);
  if (forks() != forks_before && others_wait)
    Py_FatalError("a signal's handler forked during a call of gatewise, whose other threads the child does not have");
  state_ = PyEval_SaveThread();
  std::fesetenv(&cores_mode);
  const Clock::time_point end = Clock::now();
  next_look_ = end + std::clamp<Clock::duration>(pauses_of_a_look * (end - begin), min_pause, max_pause);
}

}  // namespace gatewise
