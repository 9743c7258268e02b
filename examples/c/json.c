#include "json.h"

#include <string.h>

static const json nothing = {NULL, NULL};

static json blank(json v) {
  while (v.at && v.at < v.end && strchr(" \t\r\n", *v.at) && *v.at) v.at++;
  return v.at && v.at < v.end ? v : nothing;
}

static int is(json v, char c) { return v.at && v.at < v.end && *v.at == c; }

/* Past a string that begins here; not there where it does not end. */
static json past_string(json v) {
  for (v.at++; v.at < v.end && *v.at != '"'; v.at++)
    if (*v.at == '\\') v.at++;
  if (v.at >= v.end) return nothing;
  v.at++;
  return v;
}

/* Past any value: strings whole, brackets by counting, the rest up to what ends it. */
static json past(json v) {
  if (is(v, '"')) return past_string(v);
  if (!is(v, '{') && !is(v, '[')) {
    while (v.at && v.at < v.end && !strchr(",]} \t\r\n", *v.at)) v.at++;
    return v;
  }
  for (size_t depth = 0; v.at && v.at < v.end;) {
    if (is(v, '"')) {
      v = past_string(v);
      continue;
    }
    if (is(v, '{') || is(v, '[')) depth++;
    if ((is(v, '}') || is(v, ']')) && --depth == 0) return (json){v.at + 1, v.end};
    v.at++;
  }
  return nothing;
}

json json_document(const char *text, size_t bytes) { return blank((json){text, text + bytes}); }

int json_is(json v, const char *text) {
  const size_t n = strlen(text);
  return is(v, '"') && (size_t)(v.end - v.at) >= n + 2 && !memcmp(v.at + 1, text, n) && v.at[n + 1] == '"';
}

json json_get(json v, const char *key) {
  json found = nothing;
  if (!is(v, '{')) return nothing;
  v.at++;
  for (v = blank(v); is(v, '"'); v = blank(v)) {
    const int wanted = json_is(v, key);
    v = blank(past_string(v));
    if (!is(v, ':')) return nothing;
    v.at++, v = blank(v);
    if (wanted && found.at) return nothing;
    if (wanted) found = v;
    v = blank(past(v));
    if (is(v, ',')) v.at++;
  }
  return is(v, '}') ? found : nothing;
}

json json_first(json v) {
  if (!is(v, '[')) return nothing;
  v.at++, v = blank(v);
  return is(v, ']') ? nothing : v;
}

json json_next(json v) {
  v = blank(past(v));
  if (!is(v, ',')) return nothing;
  v.at++;
  return blank(v);
}

size_t json_count(json v) {
  size_t n = 0;
  for (v = json_first(v); v.at; v = json_next(v)) n++;
  return n;
}

long json_number(json v) {
  long value = 0;
  if (!v.at || v.at >= v.end || *v.at < '0' || *v.at > '9') return -1;
  for (; v.at < v.end && *v.at >= '0' && *v.at <= '9'; v.at++) {
    value = 10 * value + (*v.at - '0');
    if (value > 0x7fffffffL) return -1;
  }
  return v.at < v.end && strchr(",]} \t\r\n", *v.at) ? value : -1;
}

int json_text(json v, char *out, size_t room) {
  const json end = is(v, '"') ? past_string(v) : nothing;
  if (!end.at || (size_t)(end.at - v.at) - 2 >= room) return 0;
  const size_t n = (size_t)(end.at - v.at) - 2;
  memcpy(out, v.at + 1, n);
  out[n] = 0;
  return 1;
}
