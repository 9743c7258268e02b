/* As much of JSON as it takes to look something up in a manifest: no tree, no copies, nothing beyond the given bytes is read.
 * A value is where its text begins and where the document ends; one that is not there has `at` NULL, and looking anything up in
 * it gives another that is not there, so a chain of lookups needs one check at its end. A host with a JSON library uses that. */
#ifndef JSON_H
#define JSON_H

#include <stddef.h>

typedef struct json {
  const char *at, *end;
} json;

json json_document(const char *text, size_t bytes);

/* The value of a key. Not there where the value is no object, or where the key occurs twice: two readers would differ. */
json json_get(json object, const char *key);

/* An array's first item, and the item after one; not there at the end. */
json json_first(json array);
json json_next(json item);
size_t json_count(json array);

/* A whole number from 0 to 2^31 - 1, or -1 for anything else. */
long json_number(json value);

/* Whether it is the string `text`, written without escapes. */
int json_is(json value, const char *text);

/* A string's characters as they are written; 0 where it is none or there is no room for it and a final zero. */
int json_text(json value, char *out, size_t room);

#endif
