/* What libstdc++.a of a newer system takes from glibc and glibc 2.28 lacks. Linked into wheels only: `make wheels`. */

#include <sys/random.h>

/* glibc 2.32: whether the process has one thread. 0 is always right and makes reference counts atomic. */
char __libc_single_threaded = 0;

/* glibc 2.36: behind std::random_device, which no kernel uses. */
unsigned int arc4random(void) {
  unsigned int word = 0;
  while (getrandom(&word, sizeof word, 0) != (long)sizeof word) {
  }
  return word;
}

/* glibc 2.38: strtoul that also reads C23's 0b101, behind GLIBCXX_TUNABLES. Declared here since the header of a newer
   glibc may give strtoul that very name. */
extern unsigned long strtoul(const char* text, char** end, int base);
unsigned long __isoc23_strtoul(const char* text, char** end, int base) { return strtoul(text, end, base); }
