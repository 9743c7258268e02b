/* Opens and verifies each file named: "FILE<tab>status<tab>sentence" a line. What tests drive under sanitizers. */
#include <stdio.h>
#include <stdlib.h>

#include "edgeml_bundle.h"

static int look(const char *path, edgeml_bundle_fault *fault) {
  edgeml_bundle *bundle;
  int status = edgeml_bundle_open(path, &bundle, fault);
  if (status) return status;
  status = edgeml_bundle_verify(bundle, fault);
  for (uint32_t i = 0; i < edgeml_bundle_page_count(bundle) && !status; i++) {
    edgeml_bundle_page page;
    edgeml_bundle_get_page(bundle, i, &page);
    void *data = malloc(page.length); /* opening has seen to it that the file is as long */
    status = data ? edgeml_bundle_read(bundle, i, data, fault) : EDGEML_BUNDLE_NO_MEMORY;
    free(data);
  }
  edgeml_bundle_close(bundle);
  return status;
}

int main(int count, char **paths) {
  for (int i = 1; i < count; i++) {
    edgeml_bundle_fault fault = {.page = -1, .row = -1, .sentence = "done"};
    char text[200];
    int status = look(paths[i], &fault);
    printf("%s\t%d\t%s\n", paths[i], status, edgeml_bundle_fault_text(&fault, text, sizeof text));
  }
  return 0;
}
