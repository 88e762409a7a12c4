// Feeds a target with inputs where libFuzzer is not at hand.
//
//   TARGET --executions N [--seed S] [--openmp]    inputs of a seeded generator
//   TARGET --input HEX [--openmp]                  the one that a failure has printed
#include <dlfcn.h>
#include <sanitizer/common_interface_defs.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "input.h"

// An abort should be reported as well; memory that was freed need not be watched for long.
extern "C" const char* __asan_default_options() {
  return "handle_abort=1:quarantine_size_mb=16:detect_leaks=0";
}

namespace {

constexpr size_t kInputBytes = 96;
// an input takes milliseconds: one that takes this long hangs
constexpr unsigned kSeconds = 60;

uint8_t input[kInputBytes];
size_t input_size = 0;

void print_input() {
  std::fprintf(stderr, "input: --input ");
  for (size_t i = 0; i < input_size; ++i) std::fprintf(stderr, "%02x", input[i]);
  std::fprintf(stderr, "%s\n", tunesmith_has_openmp() ? " --openmp" : "");
}

void run() {
  // a copy that ends where its memory ends
  std::vector<uint8_t> copy(input, input + input_size);
  alarm(kSeconds);
  LLVMFuzzerTestOneInput(copy.data(), copy.size());
}

void load_openmp() {
  if (dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "no OpenMP: %s\n", dlerror());
    std::exit(2);
  }
}

}  // namespace

int main(int count, char** args) {
  int64_t wanted = 0;
  uint64_t seed = 0;
  bool generate = true;
  for (int i = 1; i < count; ++i) {
    const std::string option = args[i];
    const char* value = i + 1 < count ? args[i + 1] : "";
    if (option == "--executions") {
      wanted = std::atoll(value);
      ++i;
    } else if (option == "--seed") {
      seed = std::strtoull(value, nullptr, 10);
      ++i;
    } else if (option == "--input") {
      generate = false;
      for (; value[2 * input_size] != 0 && input_size < kInputBytes; ++input_size) {
        const char digits[3] = {value[2 * input_size], value[2 * input_size + 1], 0};
        input[input_size] = uint8_t(std::strtoul(digits, nullptr, 16));
      }
      ++i;
    } else if (option == "--openmp") {
      load_openmp();
    }
  }
  __sanitizer_set_death_callback(print_input);
  std::signal(SIGALRM, [](int) { fuzz::fail("no end after %u seconds", kSeconds); });
  fuzz::Random random(seed);
  int64_t inputs = 0;
  while (generate && fuzz::executions < wanted) {
    // seldom so short that choices are left out
    input_size = random.bits() % 32 == 0 ? random.bits() % kInputBytes : kInputBytes;
    for (size_t i = 0; i < input_size; ++i) input[i] = uint8_t(random.bits());
    run();
    ++inputs;
  }
  if (!generate) run();
  std::printf("%lld executions, %lld inputs\n", static_cast<long long>(fuzz::executions),
              static_cast<long long>(inputs));
}
