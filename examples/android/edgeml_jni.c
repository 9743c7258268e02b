/* The native side of an app whose Kotlin (or Java) runs the graphs with onnxruntime's own classes: bundle, context and request.
 * docs/phones.md has the Kotlin to it. A handle is used from one thread, but for `evictAll`. Failures are IOExceptions with a sentence.
 */
#include <jni.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edgeml.h"
#include "edgeml_bundle.h"

typedef struct { edgeml_bundle *bundle; edgeml_context *context; edgeml_request request; } host;

static void *fail(JNIEnv *env, const char *text) {
  (*env)->ThrowNew(env, (*env)->FindClass(env, "java/io/IOException"), text);
  return NULL;
}

/* `fd` may be closed afterwards. */
JNIEXPORT jlong JNICALL Java_org_example_Edgeml_open(JNIEnv *env, jclass type, jint fd) {
  edgeml_bundle_fault fault;
  char text[200];
  host *h = calloc(1, sizeof *h);
  if (!h || edgeml_bundle_open_fd(fd, &h->bundle, &fault)) {
    fail(env, h ? edgeml_bundle_fault_text(&fault, text, sizeof text) : "not enough memory");
    free(h), h = NULL;
  }
  return (jlong)(intptr_t)h;
}

/* The bytes of a page, checked; of -1 the manifest. */
JNIEXPORT jbyteArray JNICALL Java_org_example_Edgeml_bytes(JNIEnv *env, jclass type, jlong handle, jint page) {
  const host *h = (host *)(intptr_t)handle;
  edgeml_bundle_fault fault;
  edgeml_bundle_page about;
  char text[200];
  size_t size = 0;
  const char *manifest = edgeml_bundle_manifest(h->bundle, &size);
  if (page >= 0) {
    if (edgeml_bundle_get_page(h->bundle, (uint32_t)page, &about) || about.length > INT32_MAX) return fail(env, "there is no such page");
    size = about.length;
  }
  jbyteArray array = (*env)->NewByteArray(env, (jsize)size);
  void *to = array ? (*env)->GetByteArrayElements(env, array, NULL) : NULL;
  if (!to) return NULL; /* an OutOfMemoryError is on its way */
  int status = 0;
  if (page >= 0) status = edgeml_bundle_read(h->bundle, (uint32_t)page, to, &fault);
  else memcpy(to, manifest, size);
  (*env)->ReleaseByteArrayElements(env, array, to, 0);
  return status ? fail(env, edgeml_bundle_fault_text(&fault, text, sizeof text)) : array;
}

/* `flat`: of each site hidden, top_k, how many routed and shared experts, then their (page, expert within it). Returns the number for
 * "edgeml.context". `budget`: bytes of weights in memory. */
JNIEXPORT jstring JNICALL Java_org_example_Edgeml_start(JNIEnv *env, jclass type, jlong handle, jintArray flat, jint site_count,
                                                        jlong budget, jint threads) {
  host *h = (host *)(intptr_t)handle;
  edgeml_site *sites = calloc((size_t)site_count + 1, sizeof *sites);
  jint *given = (*env)->GetIntArrayElements(env, flat, NULL);
  edgeml_options options = {.fd = edgeml_bundle_fd(h->bundle), .sites = sites, .site_count = (uint32_t)site_count,
                            .threads = (uint32_t)threads, .readers = 3, .requests = 2, .ahead = 4};
  options.index = edgeml_bundle_index(h->bundle, &options.index_bytes);
  edgeml_plan_result plan;
  edgeml_fault fault = {0};
  int status = sites && given ? EDGEML_OK : EDGEML_NO_MEMORY;
  const jint *at = given;
  for (jint i = 0; !status && i < site_count; i++) {
    sites[i] = (edgeml_site){.hidden = (uint32_t)at[0], .top_k = (uint32_t)at[1], .expert_count = (uint32_t)at[2], .shared_count = (uint32_t)at[3]};
    sites[i].experts = (const edgeml_expert_ref *)(at + 4);
    sites[i].shared = sites[i].experts + sites[i].expert_count;
    at += 4 + 2 * (sites[i].expert_count + sites[i].shared_count);
  }
  if (!status) status = edgeml_plan(&options, &plan);
  if (!status) {
    const uint64_t fixed = plan.pinned_bytes + plan.scratch_bytes, room = (uint64_t)budget > fixed ? (uint64_t)budget - fixed : 0;
    const uint64_t fit = plan.slot_bytes ? room / plan.slot_bytes : 0;
    options.slots = fit < plan.pageable_pages ? (uint32_t)(fit ? fit : 1) : plan.pageable_pages;
    options.direct = options.slots < plan.pageable_pages;
    status = edgeml_open(&options, &h->context, &fault);
  }
  (*env)->ReleaseIntArrayElements(env, flat, given, JNI_ABORT);
  free(sites);
  if (status) return fail(env, edgeml_status_text(status));
  char number[24];
  snprintf(number, sizeof number, "%llu", (unsigned long long)edgeml_handle(h->context));
  return (*env)->NewStringUTF(env, number);
}

JNIEXPORT void JNICALL Java_org_example_Edgeml_begin(JNIEnv *env, jclass type, jlong handle) {
  host *h = (host *)(intptr_t)handle;
  const int status = edgeml_request_begin(h->context, &h->request);
  if (status) fail(env, edgeml_status_text(status));
}

/* Returns the milliseconds that the request waited for pages. */
JNIEXPORT jdouble JNICALL Java_org_example_Edgeml_end(JNIEnv *env, jclass type, jlong handle) {
  host *h = (host *)(intptr_t)handle;
  edgeml_request_end(&h->request);
  return (double)h->request.counters.page_wait_ns / 1e6;
}

JNIEXPORT void JNICALL Java_org_example_Edgeml_evictAll(JNIEnv *env, jclass type, jlong handle) {
  edgeml_evict_all(((host *)(intptr_t)handle)->context);
}

/* After the sessions are closed. */
JNIEXPORT void JNICALL Java_org_example_Edgeml_close(JNIEnv *env, jclass type, jlong handle) {
  host *h = (host *)(intptr_t)handle;
  if (edgeml_close(h->context)) { fail(env, "sessions still use the bundle"); return; }
  edgeml_bundle_close(h->bundle);
  free(h);
}
