// Switching stacks on x86-64, and the sanitizers' functions that must hear of it. Included by
// emu.cpp alone: it emits a symbol.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#error "the emulator switches x86-64 stacks"
#endif

#if defined(SF_EMU_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#if defined(SF_EMU_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_poison_memory_region(const volatile void* address, size_t size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
#endif

extern "C" void sf_emu_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.globl sf_emu_switch
.type sf_emu_switch, @function
sf_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sf_emu_switch, .-sf_emu_switch
)");
