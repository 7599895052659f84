/* Parts of a product on PyTorch's threads. */
#include "avx512.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <unistd.h>

typedef struct {
    const openmp_t *openmp;
    int parts;
    void (*function)(const void *, int);
    const void *task;
} parts_t;

static void run_thread(void *all) {
    const parts_t *p = all;
    for (int part = p->openmp->thread_number(); part < p->parts; part += p->openmp->thread_count())
        p->function(p->task, part);
}

/* The process that loaded this library. A forked one has none of its threads. */
static pid_t loaded_by;
__attribute__((constructor)) static void note_process(void) { loaded_by = getpid(); }

void packed_run_parts(const openmp_t *openmp, int parts, void (*function)(const void *, int), const void *task) {
    if (parts > 1 && openmp && loaded_by == getpid()) {
        parts_t all = {openmp, parts, function, task};
        openmp->parallel(run_thread, &all, (unsigned)parts, 0);
        return;
    }
    for (int part = 0; part < parts; part++) function(task, part);
}
#endif
