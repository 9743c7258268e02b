/* The part of onnxruntime's C interface that an answer needs, declared by place: the interface is a table of functions that only
 * grows, so these places are the same in every version from 1.17 on. A program with onnxruntime_c_api.h at hand uses that. */
#ifndef ORT_H
#define ORT_H

#include <stddef.h>
#include <stdint.h>

typedef void ort_status; /* NULL: fine; to be released */
typedef ort_status *ort_function(void);

typedef struct ort_api {
  ort_function *slot[275];
} ort_api;

typedef struct ort_base {
  const ort_api *(*get_api)(uint32_t version);
  const char *(*get_version)(void);
} ort_base;

enum { ORT_API_VERSION = 17, ORT_FATAL = 4, /* of log messages; what matters is returned */ ORT_FLOAT = 1, ORT_INT64 = 7, ORT_ARENA = 0 };

/* ORT(api, name, arguments...): the function of that name. */
#define ORT(api, name, ...) (((ort_##name##_type *)(void *)(api)->slot[ort_##name])(__VA_ARGS__))

typedef const char *ort_error_message_type(const ort_status *);
typedef ort_status *ort_create_env_type(int severity, const char *name, void **env);
typedef ort_status *ort_create_session_type(void *env, const void *model, size_t bytes, const void *options, void **session);
typedef ort_status *ort_run_type(void *session, const void *run_options, const char *const *input_names, void *const *inputs,
                                 size_t input_count, const char *const *output_names, size_t output_count, void **outputs);
typedef ort_status *ort_create_options_type(void **options);
typedef ort_status *ort_plain_option_type(void *options);
typedef ort_status *ort_number_option_type(void *options, int value);
typedef ort_plain_option_type ort_no_pattern_type, ort_no_arena_type;
typedef ort_number_option_type ort_set_severity_type, ort_set_threads_type;
typedef ort_status *ort_create_tensor_type(const void *memory, void *data, size_t bytes, const int64_t *dims, size_t rank, int type, void **value);
typedef ort_status *ort_tensor_data_type(void *value, void **data);
typedef ort_status *ort_element_count_type(const void *info, size_t *count);
typedef ort_status *ort_tensor_info_type(const void *value, void **info);
typedef ort_status *ort_element_type_type(const void *info, int *type);
typedef ort_status *ort_cpu_memory_type(int allocator, int kind, void **memory);
typedef ort_status *ort_add_entry_type(void *options, const char *key, const char *value);
typedef void ort_release_type(void *thing);
typedef ort_release_type ort_release_env_type, ort_release_status_type, ort_release_memory_type, ort_release_session_type,
    ort_release_value_type, ort_release_info_type, ort_release_options_type;

enum {
  ort_error_message = 2, ort_create_env = 3, ort_create_session = 8, ort_run = 9, ort_create_options = 10, ort_no_pattern = 17,
  ort_no_arena = 19, ort_set_severity = 22, ort_set_threads = 24, ort_create_tensor = 49, ort_tensor_data = 51,
  ort_element_type = 60, ort_element_count = 64, ort_tensor_info = 65, ort_cpu_memory = 69, ort_release_env = 92,
  ort_release_status = 93, ort_release_memory = 94, ort_release_session = 95, ort_release_value = 96, ort_release_info = 99,
  ort_release_options = 100, ort_add_entry = 130
};

#endif
