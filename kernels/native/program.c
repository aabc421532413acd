/* Steps replayed: the calls of one step, recorded with their arguments, are made again by one call from Python.
 *
 * What Python does between two kernels of a decoding step costs little by itself. But the weights that a kernel streams
 * evict the interpreter from the caches, so that each time it comes back cold.
 */
#include "operations.h"

union argument {
    void *address;
    int64_t integer;
    double real;
};

enum { MAX_ARGUMENTS = 25 };

struct call {
    int (*function)(const union argument *); /* one of those below */
    union argument arguments[MAX_ARGUMENTS];
};

/* An argument that differs from run to run: an offset into one of the step's inputs. */
struct patch {
    int64_t call, argument, input, offset;
};

int replay_linear(const union argument *a) {
    linear(a[0].address, a[1].integer, a[2].address, (int)a[3].integer, a[4].address, a[5].address, a[6].address,
           a[7].integer, a[8].integer, a[9].integer, (int)a[10].integer);
    return 0;
}

int replay_panel_linear(const union argument *a) {
    return panel_linear(a[0].address, a[1].integer, (int)a[2].integer, a[3].address, (int)a[4].integer, a[5].address,
                        a[6].integer, a[7].address, a[8].address, a[9].address, a[10].integer, a[11].address,
                        a[12].integer, (int)a[13].integer, a[14].integer, a[15].integer, a[16].integer,
                        a[17].integer, (int)a[18].integer);
}

int replay_rms_norm(const union argument *a) {
    rms_norm(a[0].address, a[1].integer, a[2].address, (float)a[3].real, a[4].address, a[5].integer, a[6].integer,
             a[7].integer, (int)a[8].integer, (int)a[9].integer);
    return 0;
}

int replay_silu_and_multiply(const union argument *a) {
    silu_and_multiply(a[0].address, a[1].integer, a[2].address, a[3].integer, a[4].integer, a[5].integer,
                      (int)a[6].integer, (int)a[7].integer);
    return 0;
}

int replay_join_columns(const union argument *a) {
    join_columns(a[0].address, a[1].integer, a[2].integer, a[3].address, a[4].integer, a[5].integer, a[6].address,
                 a[7].integer);
    return 0;
}

int replay_gather_rows(const union argument *a) {
    return gather_rows(a[0].address, (int)a[1].integer, a[2].integer, a[3].address, a[4].address, (int)a[5].integer,
                       a[6].integer, a[7].integer);
}

int replay_pass_features(const union argument *a) {
    return pass_features(a[0].address, a[1].address, a[2].address, a[3].address, (int)a[4].integer, a[5].integer,
                         a[6].address, a[7].integer, a[8].integer, (int)a[9].integer);
}

int replay_rotary_angles(const union argument *a) {
    rotary_angles(a[0].address, a[1].integer, a[2].address, (float)a[3].real, a[4].address, a[5].address, a[6].integer,
                  a[7].integer, (int)a[8].integer);
    return 0;
}

int replay_argmax_rows(const union argument *a) {
    argmax_rows(a[0].address, a[1].integer, a[2].address, a[3].integer, a[4].integer, (int)a[5].integer);
    return 0;
}

int replay_guess_rows(const union argument *a) {
    guess_rows(a[0].address, a[1].integer, a[2].address, a[3].address, a[4].address, a[5].address, a[6].address,
               a[7].address, a[8].integer, a[9].integer, (int)a[10].integer);
    return 0;
}

int replay_rotate_and_store(const union argument *a) {
    return rotate_and_store(a[0].address, a[1].integer, a[2].address, a[3].address, (float)a[4].real, a[5].address,
                            a[6].address, a[7].address, a[8].address, a[9].integer, a[10].integer, a[11].integer,
                            a[12].integer, a[13].integer, a[14].integer, a[15].integer, (int)a[16].integer,
                            (int)a[17].integer, (int)a[18].integer);
}

int replay_paged_attention(const union argument *a) {
    return paged_attention(a[0].address, a[1].integer, a[2].integer, a[3].address, a[4].integer, a[5].integer,
                           a[6].address, a[7].integer, a[8].integer, a[9].address, a[10].address, a[11].address,
                           a[12].address, a[13].address, a[14].address, a[15].integer, a[16].integer, a[17].integer,
                           a[18].integer, a[19].integer, a[20].integer, (float)a[21].real, (int)a[22].integer,
                           (int)a[23].integer, (int)a[24].integer);
}

/* Returns 0, or what the first call returned that did not return 0; later calls are not made. */
int run_program(struct call *calls, int64_t num_calls, const struct patch *patches, int64_t num_patches,
                char *const *inputs) {
    for (int64_t i = 0; i < num_patches; i++) {
        const struct patch *patch = &patches[i];
        calls[patch->call].arguments[patch->argument].address = inputs[patch->input] + patch->offset;
    }
    for (int64_t i = 0; i < num_calls; i++) {
        int status = calls[i].function(calls[i].arguments);
        if (status != 0) return status;
    }
    return 0;
}
