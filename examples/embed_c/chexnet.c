/* See chexnet.h. From top to bottom: messages, files, hashes and signatures, JSON, the manifest, releases, known answers,
   pictures, backends, and what the header declares. The Python runtime's modules say why each rule is as it is. */
#define _DEFAULT_SOURCE
#include "chexnet.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <locale.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <openssl/evp.h>
#include <zlib.h>

#define MAX_MANIFEST_BYTES 65536
#define MAX_SIGNATURE_BYTES 4096
#define MAX_FLOOR_BYTES 1024
#define MAX_MODEL_BYTES ((size_t)1 << 29)
#define MAX_PROBE_BYTES ((size_t)1 << 27)
#define MAX_PIXELS 36000000
#define MAX_FINDINGS 256
#define MAX_KEYS 64
#define MAX_SIGNATURES 8
#define MAX_PATIENT 99999999
#define MAX_PATIENTS 1000000
#define N_PROBES 32
#define N_STARTUP_PROBES 4
#define LOGIT_SLACK 2e-3
#define CAM_IDENTITY_TOLERANCE 1e-4
#define LOCK_TIMEOUT_S 5
#define AGAIN "Copy the bundle again or export it again."
#define NO_MEMORY "found no memory; needed some. Next: close other programs."

/* ---- messages ---- */

__attribute__((format(printf, 3, 4))) static int fail(char *message, int status, const char *format, ...) {
  if (message) {
    va_list values;
    va_start(values, format);
    vsnprintf(message, CHEXNET_MESSAGE_BYTES, format, values);
    va_end(values);
    for (char *c = message; *c; c++) /* names from a disk may hold anything; a message is one line */
      if ((unsigned char)*c < 0x20 || *c == 0x7f) *c = ' ';
  }
  return status;
}

/* ---- files: opened once, without following links; kind, links and size are read from the open file ---- */

typedef struct {
  uint8_t *bytes; /* one NUL more than size */
  size_t size;
} content;

typedef struct {
  size_t limit;
  int error;          /* status of every refusal */
  bool follows_links; /* for files that the user names */
  mode_t refused_mode;
} plain_file;

static int not_plain(const char *where, const char *name, int error, char *message) {
  return fail(message, error, "%s/%s is not a plain file. Copy it without links. " AGAIN, where, name);
}

/* folder AT_FDCWD and where "" for a file named by its own path. */
static int read_plain(int folder, const char *where, const char *name, plain_file how, content *out, char *message) {
  struct stat status;
  size_t done = 0;
  int result = how.error;
  char extra;
  out->bytes = NULL;
  /* O_NONBLOCK: opening a named pipe would else wait for its writer. */
  int file = openat(folder, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | (how.follows_links ? 0 : O_NOFOLLOW));
  if (file < 0) {
    if (errno == ENOENT) return fail(message, how.error, "%s/%s is missing. " AGAIN, where, name);
    if (errno == ELOOP || errno == ENXIO || errno == ENODEV) return not_plain(where, name, how.error, message);
    return fail(message, how.error, "%s/%s can't be read: %s. Check the disk.", where, name, strerror(errno));
  }
  if (fstat(file, &status) != 0) {
    fail(message, how.error, "%s/%s can't be read: %s. Check the disk.", where, name, strerror(errno));
  } else if (!S_ISREG(status.st_mode)) {
    not_plain(where, name, how.error, message);
  } else if (status.st_nlink > 1 && !how.follows_links) {
    fail(message, how.error, "%s/%s has several names (hard links). Copy it without links.", where, name);
  } else if (status.st_mode & how.refused_mode) {
    fail(message, how.error, "%s/%s may be written by everyone. Run: chmod o-w", where, name);
  } else if (status.st_size < 0 || (uintmax_t)status.st_size > how.limit) {
    fail(message, how.error, "%s/%s has %jd bytes, at most %zu may be. " AGAIN, where, name, (intmax_t)status.st_size,
         how.limit);
  } else if (!(out->bytes = malloc((size_t)status.st_size + 1))) {
    fail(message, how.error, NO_MEMORY);
  } else {
    out->size = (size_t)status.st_size;
    while (done < out->size) {
      ssize_t n = read(file, out->bytes + done, out->size - done);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) break;
      done += (size_t)n;
    }
    out->bytes[done] = 0;
    if (done == out->size && read(file, &extra, 1) == 0) {
      result = CHEXNET_OK;
    } else {
      fail(message, how.error, "%s/%s can't be read, or changed while it was read. " AGAIN, where, name);
      free(out->bytes);
      out->bytes = NULL;
    }
  }
  close(file);
  return result;
}

/* ---- hashes, base64, signatures ---- */

static void to_hex(const uint8_t *bytes, size_t n, char *hex) {
  for (size_t i = 0; i < n; i++) snprintf(hex + 2 * i, 3, "%02x", bytes[i]);
}

static bool sha256_hex(const void *bytes, size_t n, char hex[65]) {
  uint8_t digest[EVP_MAX_MD_SIZE];
  unsigned size = 0;
  if (EVP_Digest(bytes, n, digest, &size, EVP_sha256(), NULL) != 1 || size != 32) return false;
  to_hex(digest, 32, hex);
  return true;
}

static bool is_hex(const char *text, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (!((text[i] >= '0' && text[i] <= '9') || (text[i] >= 'a' && text[i] <= 'f'))) return false;
  return true;
}

static int base64_value(char c) {
  if (c >= 'A' && c <= 'Z') return c - 'A';
  if (c >= 'a' && c <= 'z') return c - 'a' + 26;
  if (c >= '0' && c <= '9') return c - '0' + 52;
  return c == '+' ? 62 : c == '/' ? 63 : -1;
}

/* Return the bytes' number, or -1; out needs n / 4 * 3 bytes. */
static long decode_base64(const char *text, size_t n, uint8_t *out) {
  long size = 0;
  if (n % 4) return -1;
  for (size_t i = 0; i < n; i += 4) {
    size_t n_padding = i + 4 < n || text[i + 3] != '=' ? 0 : text[i + 2] == '=' ? 2 : 1;
    uint32_t bits = 0;
    for (size_t k = 0; k < 4; k++) {
      int value = k < 4 - n_padding ? base64_value(text[i + k]) : 0;
      if (value < 0) return -1;
      bits = bits << 6 | (uint32_t)value;
    }
    for (size_t k = 0; k < 3 - n_padding; k++) out[size++] = (uint8_t)(bits >> (16 - 8 * k));
  }
  return size;
}

typedef struct {
  uint8_t raw[32];
  char fingerprint[65];
} public_key;

static bool is_line(const char *text, size_t n) {
  for (size_t i = 0; i < n; i++) {
    bool first = islower((unsigned char)text[i]) || isdigit((unsigned char)text[i]);
    if (!isascii((unsigned char)text[i]) || !(first || (i && text[i] && strchr("._-", text[i])))) return false;
  }
  return n >= 1 && n <= 64;
}

/* Check a trust, as its file is checked in Python, and decode its keys. */
static int read_trust(const chexnet_trust *trust, public_key keys[MAX_KEYS], char *message) {
  static const uint8_t ED25519_DER[12] = {0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00}; /* RFC 8410 */
  bool any = false;
  if (trust->n_keys < 1 || trust->n_keys > MAX_KEYS)
    return fail(message, CHEXNET_TRUST_ERROR, "the trust has %d keys, needed 1 to %d. Correct it.", trust->n_keys, MAX_KEYS);
  for (int i = 0; i < trust->n_keys; i++) {
    const char *text = trust->keys[i].public_key;
    uint8_t der[48];
    if (!text || strlen(text) > 64 || decode_base64(text, strlen(text), der) != 44 || memcmp(der, ED25519_DER, 12) != 0)
      return fail(message, CHEXNET_TRUST_ERROR,
                  "key %d of the trust is no Ed25519 public key; needed the middle line of `openssl pkey -pubout`.", i);
    memcpy(keys[i].raw, der + 12, 32);
    if (!sha256_hex(der, 44, keys[i].fingerprint)) return fail(message, CHEXNET_TRUST_ERROR, NO_MEMORY);
    for (int k = 0; k < i; k++)
      if (memcmp(keys[k].raw, keys[i].raw, 32) == 0)
        return fail(message, CHEXNET_TRUST_ERROR, "key %d of the trust is listed twice. Correct it.", i);
    any = any || !trust->keys[i].is_revoked;
  }
  if (!any) return fail(message, CHEXNET_TRUST_ERROR, "every key is revoked, so nothing can be trusted. Correct the trust.");
  if (trust->min_release < 0 || (trust->line ? !is_line(trust->line, strlen(trust->line)) : trust->min_release || trust->floor_file))
    return fail(message, CHEXNET_TRUST_ERROR, "the trust's line or min_release is wrong, or no line is given. Correct it.");
  return CHEXNET_OK;
}

static bool verify_ed25519(const uint8_t raw[32], const uint8_t signature[64], const uint8_t *bytes, size_t n) {
  EVP_PKEY *key = EVP_PKEY_new_raw_public_key(EVP_PKEY_ED25519, NULL, raw, 32);
  EVP_MD_CTX *context = EVP_MD_CTX_new();
  bool good = key && context && EVP_DigestVerifyInit(context, NULL, NULL, NULL, key) == 1 &&
              EVP_DigestVerify(context, signature, 64, bytes, n) == 1;
  EVP_MD_CTX_free(context);
  EVP_PKEY_free(key);
  return good;
}

static bool take(const char **at, const char *expected) {
  size_t n = strlen(expected);
  if (strncmp(*at, expected, n) != 0) return false;
  *at += n;
  return true;
}

/* Needs a signature by a trusted key, and no wrong one by any; manifest.sig is taken in the one form that `sign` writes. */
static int check_signature(const chexnet_trust *trust, const public_key *keys, content manifest, content signatures,
                           const char *where, char *message) {
  static const char TYPE[] = "application/vnd.chexnet-deploy.manifest.v1+json";
  const char *at = (const char *)signatures.bytes, *former = NULL;
  const char *fingerprints[MAX_SIGNATURES];
  uint8_t values[MAX_SIGNATURES][64];
  int n = 0;
  bool more = take(&at, "{\n  \"format\": 1,\n  \"signatures\": [\n"), well_formed = more;
  while (well_formed && more) {
    well_formed = n < MAX_SIGNATURES && take(&at, "    {\n      \"key\": \"");
    if (!well_formed) break;
    fingerprints[n] = at;
    well_formed = strnlen(at, 64) == 64 && is_hex(at, 64) && (!former || memcmp(former, at, 64) < 0);
    if (!well_formed) break;
    former = at;
    at += 64;
    well_formed = take(&at, "\",\n      \"ed25519\": \"") && strnlen(at, 128) == 128 && is_hex(at, 128);
    if (!well_formed) break;
    for (int i = 0; i < 64; i++) {
      char digits[3] = {at[2 * i], at[2 * i + 1], 0};
      values[n][i] = (uint8_t)strtoul(digits, NULL, 16);
    }
    at += 128;
    n++;
    more = take(&at, "\"\n    },\n");
    if (!more) well_formed = take(&at, "\"\n    }\n  ]\n}\n");
  }
  if (!well_formed || at != (const char *)signatures.bytes + signatures.size)
    return fail(message, CHEXNET_TRUST_ERROR,
                "%s/manifest.sig is not in the form that `sign` writes. Copy the bundle again, or delete it and sign again.", where);

  char head[128];
  int n_head = snprintf(head, sizeof head, "DSSEv1 %zu %s %zu ", sizeof TYPE - 1, TYPE, manifest.size);
  uint8_t *signed_bytes = malloc((size_t)n_head + manifest.size);
  if (!signed_bytes) return fail(message, CHEXNET_TRUST_ERROR, NO_MEMORY);
  memcpy(signed_bytes, head, (size_t)n_head);
  memcpy(signed_bytes + n_head, manifest.bytes, manifest.size);
  bool is_signed = false, is_wrong = false;
  for (int i = 0; i < n && !is_wrong; i++)
    for (int k = 0; k < trust->n_keys; k++)
      if (!trust->keys[k].is_revoked && memcmp(keys[k].fingerprint, fingerprints[i], 64) == 0) {
        bool good = verify_ed25519(keys[k].raw, values[i], signed_bytes, (size_t)n_head + manifest.size);
        is_signed = is_signed || good;
        is_wrong = is_wrong || !good;
      }
  free(signed_bytes);
  if (is_wrong)
    return fail(message, CHEXNET_TRUST_ERROR,
                "%s: a trusted key's signature is not for this manifest. Don't use it; copy the bundle again.", where);
  if (!is_signed)
    return fail(message, CHEXNET_TRUST_ERROR, "%s is signed by no trusted key. Don't use it; ask who delivered it.", where);
  return CHEXNET_OK;
}

/* ---- JSON (RFC 8259): strict, in place, into a flat array of nodes in the order of the text ---- */

#define MAX_DEPTH 16 /* a manifest has 4 */

typedef struct {
  char kind;    /* one of { [ " 0 t f n; of an object, keys and values take turns */
  bool is_whole;
  int size;     /* values below this one, keys too */
  int span;     /* this node and all below it */
  char *text;   /* of a string, ended by NUL and perhaps holding others */
  size_t length;
  double number; /* infinite beyond a double */
} node;

typedef struct {
  char *at, *end;
  node *nodes;
  int n;
} json;

/* Return how many bytes a UTF-8 character takes, 0 where it is none. */
static size_t utf8_bytes(const char *text, const char *end) {
  const unsigned char *c = (const unsigned char *)text;
  size_t n = *c < 0x80 ? 1 : *c >= 0xc2 && *c < 0xe0 ? 2 : (*c & 0xf0) == 0xe0 ? 3 : *c >= 0xf0 && *c < 0xf5 ? 4 : 0;
  if (!n || (size_t)(end - text) < n) return 0;
  for (size_t i = 1; i < n; i++)
    if ((c[i] & 0xc0) != 0x80) return 0;
  bool is_overlong = (*c == 0xe0 && c[1] < 0xa0) || (*c == 0xf0 && c[1] < 0x90);
  bool is_surrogate = *c == 0xed && c[1] >= 0xa0, is_beyond = *c == 0xf4 && c[1] >= 0x90;
  return is_overlong || is_surrogate || is_beyond ? 0 : n;
}

static bool parse_hex4(json *j, uint32_t *value) {
  *value = 0;
  if (j->end - j->at < 4) return false;
  for (int i = 0; i < 4; i++, j->at++) {
    if (!isxdigit((unsigned char)*j->at)) return false;
    *value = *value << 4 | (uint32_t)(isdigit((unsigned char)*j->at) ? *j->at - '0' : (*j->at | 0x20) - 'a' + 10);
  }
  return true;
}

static bool parse_escape(json *j, char **write) {
  static const char NAMES[] = "\"\\/bfnrt", VALUES[] = "\"\\/\b\f\n\r\t";
  if (j->at == j->end) return false;
  char name = *j->at++;
  if (name != 'u') {
    const char *found = name ? strchr(NAMES, name) : NULL;
    if (found) *(*write)++ = VALUES[found - NAMES];
    return found != NULL;
  }
  uint32_t code, low;
  if (!parse_hex4(j, &code) || (code >= 0xdc00 && code < 0xe000)) return false;
  if (code >= 0xd800 && code < 0xdc00) {
    if (j->end - j->at < 6 || j->at[0] != '\\' || j->at[1] != 'u') return false;
    j->at += 2;
    if (!parse_hex4(j, &low) || low < 0xdc00 || low >= 0xe000) return false;
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }
  int n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
  static const unsigned char LEADS[] = {0, 0x00, 0xc0, 0xe0, 0xf0};
  for (int i = n - 1; i > 0; i--, code >>= 6) (*write)[i] = (char)(0x80 | (code & 0x3f));
  (*write)[0] = (char)(LEADS[n] | code);
  *write += n;
  return true;
}

static bool parse_string(json *j, node *out) {
  char *write = ++j->at;
  out->text = write;
  while (j->at < j->end && *j->at != '"') {
    if ((unsigned char)*j->at < 0x20) return false;
    if (*j->at == '\\') {
      j->at++;
      if (!parse_escape(j, &write)) return false;
    } else {
      size_t n = utf8_bytes(j->at, j->end);
      if (!n) return false;
      memmove(write, j->at, n);
      write += n;
      j->at += n;
    }
  }
  if (j->at == j->end) return false;
  out->length = (size_t)(write - out->text);
  *write = 0; /* at the latest where the closing quote was */
  j->at++;
  return true;
}

static bool skip_digits(json *j) {
  char *start = j->at;
  while (j->at < j->end && isdigit((unsigned char)*j->at)) j->at++;
  return j->at > start;
}

static bool parse_number(json *j, node *out) {
  char *start = j->at;
  if (*j->at == '-') j->at++;
  bool has_zero = j->at < j->end && *j->at == '0';
  char *digits = j->at;
  if (!skip_digits(j) || (has_zero && j->at - digits > 1)) return false;
  out->is_whole = true;
  if (j->at < j->end && *j->at == '.') {
    out->is_whole = false;
    j->at++;
    if (!skip_digits(j)) return false;
  }
  if (j->at < j->end && (*j->at == 'e' || *j->at == 'E')) {
    out->is_whole = false;
    j->at++;
    if (j->at < j->end && (*j->at == '+' || *j->at == '-')) j->at++;
    if (!skip_digits(j)) return false;
  }
  out->number = strtod(start, NULL); /* ends where this ended: the text is ended by NUL */
  return true;
}

static void skip_space(json *j) {
  while (j->at < j->end && (*j->at == ' ' || *j->at == '\t' || *j->at == '\n' || *j->at == '\r')) j->at++;
}

static bool parse_value(json *j, int depth) {
  static const char *const WORDS[] = {"true", "false", "null"};
  skip_space(j);
  if (j->at == j->end || depth > MAX_DEPTH) return false;
  int own = j->n++; /* never more nodes than bytes */
  node *out = &j->nodes[own];
  *out = (node){.kind = *j->at};
  if (*j->at == '"') {
    if (!parse_string(j, out)) return false;
  } else if (*j->at == '{' || *j->at == '[') {
    bool is_object = *j->at == '{';
    char close = is_object ? '}' : ']';
    j->at++;
    skip_space(j);
    if (j->at < j->end && *j->at == close) {
      j->at++;
    } else {
      for (;;) {
        if (is_object) {
          skip_space(j);
          if (j->at == j->end || *j->at != '"' || !parse_value(j, depth + 1)) return false;
          skip_space(j);
          if (j->at == j->end || *j->at++ != ':') return false;
        }
        if (!parse_value(j, depth + 1)) return false;
        out->size += is_object ? 2 : 1;
        skip_space(j);
        if (j->at == j->end) return false;
        char mark = *j->at++;
        if (mark == close) break;
        if (mark != ',') return false;
      }
    }
  } else if (*j->at == '-' || isdigit((unsigned char)*j->at)) {
    out->kind = '0';
    if (!parse_number(j, out)) return false;
  } else {
    const char *word = NULL;
    for (int i = 0; i < 3; i++)
      if (*j->at == WORDS[i][0]) word = WORDS[i];
    if (!word || (size_t)(j->end - j->at) < strlen(word) || memcmp(j->at, word, strlen(word)) != 0) return false;
    j->at += strlen(word);
  }
  out->span = j->n - own;
  return true;
}

/* Return the nodes, to be freed, or NULL; text is changed, and its strings are pointed to. */
static node *parse_json(content text) {
  json j = {(char *)text.bytes, (char *)text.bytes + text.size, calloc(text.size + 1, sizeof(node)), 0};
  if (!j.nodes) return NULL;
  /* A point is a decimal point, whatever the console's language is. */
  locale_t plain = newlocale(LC_NUMERIC_MASK, "C", (locale_t)0), before = plain ? uselocale(plain) : (locale_t)0;
  bool good = plain && parse_value(&j, 0);
  skip_space(&j);
  if (plain) {
    uselocale(before);
    freelocale(plain);
  }
  if (good && j.at == j.end) return j.nodes;
  free(j.nodes);
  return NULL;
}

static const node *after(const node *each) { return each + each->span; }

/* Return a record's value, NULL where the text has none. */
static const node *field(const node *record, const char *name) {
  const node *key = record + 1;
  for (int i = 0; i < record->size; i += 2, key = after(key + 1))
    if (key->length == strlen(name) && memcmp(key->text, name, key->length) == 0) return key + 1;
  return NULL;
}

/* ---- the manifest: its fields and what each may hold, as chexnet_deploy/bundle/manifest.py has them ---- */

typedef enum { TEXT, WHOLE, REAL, FLAG, LIST, MAP, RECORD } kind;

typedef struct rule rule;
struct rule {
  const char *name;
  kind kind;
  bool is_optional, may_be_null;
  double low, high;               /* of a number; of a LIST's size */
  const char *words;              /* a TEXT is one of these, between bars */
  bool (*fits)(const char *, size_t); /* a TEXT's form */
  const rule *of;                 /* a LIST's or MAP's values; a RECORD's fields */
};

#define ANY .low = -INFINITY, .high = INFINITY
#define FROM(least) .low = least, .high = INFINITY
#define WITHIN(least, most) .low = least, .high = most
#define OPTIONAL .is_optional = true
#define OR_NULL .is_optional = true, .may_be_null = true

static bool is_sha256(const char *text, size_t n) { return n == 64 && is_hex(text, n); }

static bool is_code(const char *text, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (!((text[i] >= 'A' && text[i] <= 'Z') || (text[i] >= '0' && text[i] <= '9') || text[i] == '_' || text[i] == ' '))
      return false;
  return n >= 1 && n <= 16;
}

static bool is_version(const char *text, size_t n) {
  size_t major = strspn(text, "0123456789");
  size_t minor = major < n && text[major] == '.' ? strspn(text + major + 1, "0123456789") : 0;
  return major && minor && major + 1 + minor == n;
}

static bool is_short(const char *text, size_t n) { return (void)text, n <= 32768; }

static bool is_file_set(const char *text, size_t n) {
  return n % 8 == 0 && is_short(text, n) &&
         n == strspn(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/");
}

static bool has_no_nul(const char *text, size_t n) { return strlen(text) == n; }

static const rule A_TEXT = {.kind = TEXT}, A_NAME = {.kind = TEXT, .fits = has_no_nul}, A_SHA256 = {.kind = TEXT, .fits = is_sha256},
                  A_CODE = {.kind = TEXT, .fits = is_code}, A_REAL = {.kind = REAL, ANY}, A_COUNT = {.kind = WHOLE, ANY},
                  A_SHARE = {.kind = REAL, WITHIN(0, 1)}, A_STD = {.kind = REAL, WITHIN(DBL_TRUE_MIN, 1)},
                  A_POSITIVE = {.kind = REAL, FROM(0)}, AN_AGE = {.kind = WHOLE, WITHIN(0, 150)};

static const rule JPEG2000[] = {{"halvings", WHOLE, WITHIN(1, 2)}, {"max_gray_change", WHOLE, WITHIN(0, 255)}, {NULL}};
static const rule PREPROCESSING[] = {
    {"resize_px", WHOLE, OPTIONAL, WITHIN(32, 1024)},
    {"resample", TEXT, OPTIONAL, .words = "pillow-bilinear-8bit"},
    {"geometry", TEXT, OPTIONAL, .words = "squash"},
    {"jpeg2000", RECORD, OR_NULL, .of = JPEG2000},
    {"mean", LIST, OPTIONAL, WITHIN(3, 3), .of = &A_SHARE},
    {"std", LIST, OPTIONAL, WITHIN(3, 3), .of = &A_STD},
    {NULL},
};
static const rule CALIBRATION[] = {
    {"list_sha256", TEXT, .fits = is_sha256},
    {"n_images", WHOLE, FROM(1)},
    {"image_files", TEXT, OR_NULL, .fits = is_file_set},
    {"estimator", TEXT},
    {"logit_mean", LIST, ANY, .of = &A_REAL},
    {"logit_sd", LIST, ANY, .of = &A_POSITIVE},
    {"activations", LIST, OPTIONAL, ANY, .of = &A_TEXT},
    {NULL},
};
static const rule CHECK[] = {{"name", TEXT}, {"value", REAL, ANY}, {"limit", REAL, ANY}, {NULL}};
static const rule A_CHECK = {.kind = RECORD, .of = CHECK};
static const rule RELEASE[] = {{"line", TEXT, .fits = is_line}, {"number", WHOLE, WITHIN(1, INT32_MAX)}, {NULL}};
static const rule PATIENTS[] = {
    {"n_patients", WHOLE, WITHIN(1, MAX_PATIENTS)},
    {"sha256", TEXT, .fits = is_sha256},
    {"encoded", TEXT, .fits = is_short},
    {NULL},
};
static const rule PICTURE[] = {
    {"guard", TEXT, OPTIONAL, .words = "image|off"},
    {"weights", TEXT, OPTIONAL, .words = "edge-directions-1"},
    {"min_side_px", WHOLE, OPTIONAL, FROM(32)},
    {"max_aspect", REAL, OPTIONAL, FROM(1)},
    {"min_gray_levels", WHOLE, OPTIONAL, WITHIN(2, 256)},
    {"max_black_or_white_share", REAL, OPTIONAL, WITHIN(0, 1)},
    {"min_score", REAL, OPTIONAL, ANY},
    {NULL},
};
static const rule SCOPE[] = {
    {"modalities", LIST, OPTIONAL, FROM(1), .of = &A_CODE},
    {"body_parts", LIST, OPTIONAL, FROM(1), .of = &A_CODE},
    {"views", LIST, OPTIONAL, FROM(1), .of = &A_CODE},
    {"age_years", LIST, OPTIONAL, WITHIN(2, 2), .of = &AN_AGE},
    {"accepts_unknown_body_part", FLAG, OPTIONAL},
    {"accepts_unknown_view", FLAG, OPTIONAL},
    {"accepts_unknown_age", FLAG, OPTIONAL},
    {"picture", RECORD, OPTIONAL, .of = PICTURE},
    {NULL},
};
static const rule TARGET[] = {
    {"gpu", TEXT},
    {"compute_capability", TEXT},
    {"backend", TEXT, .words = "tensorrt|tensorrt_rtx"},
    {"tensorrt", TEXT},
    {"driver", TEXT, .fits = is_version},
    {"platform", TEXT},
    {NULL},
};
static const rule ENGINE_CARD[] = {
    {"build_s", REAL, ANY},
    {"plan_bytes", WHOLE, ANY},
    {"batch", LIST, WITHIN(3, 3), .of = &A_COUNT},
    {"conv_types", MAP, .of = &A_COUNT},
    {"fallbacks", LIST, ANY, .of = &A_TEXT},
    {"n_kernels", WHOLE, ANY},
    {"n_reformats", WHOLE, ANY},
    {"bytes_per_image", WHOLE, .may_be_null = true, ANY},
    {"activation_bytes", WHOLE, ANY},
    {"warnings", LIST, ANY, .of = &A_TEXT},
    {NULL},
};
static const rule MANIFEST[] = {
    {"schema_version", WHOLE, OPTIONAL, WITHIN(1, 1)},
    {"precision", TEXT, .words = "fp32|fp16|int8"},
    {"dialect", TEXT, OPTIONAL, .words = "float|typed|mixed|trt8|cpu"},
    {"findings", LIST, WITHIN(1, MAX_FINDINGS), .of = &A_NAME},
    {"preprocessing", RECORD, .of = PREPROCESSING},
    {"head_bias", LIST, ANY, .of = &A_REAL},
    {"operating_points", MAP, .of = &A_SHARE},
    {"files", MAP, .of = &A_SHA256},
    {"checkpoint_sha256", TEXT, .fits = is_sha256},
    {"ancestors", LIST, OPTIONAL, ANY, .of = &A_SHA256},
    {"calibration", RECORD, OR_NULL, .of = CALIBRATION},
    {"probe_max_abs_logit_error", REAL, FROM(0)},
    {"checks", LIST, OPTIONAL, ANY, .of = &A_CHECK},
    {"tools", MAP, .of = &A_TEXT},
    {"float_convolutions", LIST, OPTIONAL, ANY, .of = &A_TEXT},
    {"weakest_convolutions", MAP, OPTIONAL, .of = &A_POSITIVE},
    {"release", RECORD, OR_NULL, .of = RELEASE},
    {"trained_on", RECORD, OR_NULL, .of = PATIENTS},
    {"scope", RECORD, OR_NULL, .of = SCOPE},
    {"target", RECORD, OR_NULL, .of = TARGET},
    {"engine", RECORD, OR_NULL, .of = ENGINE_CARD},
    {NULL},
};
static const rule FLOOR[] = {{"format", WHOLE, OPTIONAL, WITHIN(1, 1)}, {"release", RECORD, .of = RELEASE}, {NULL}};
static const rule A_MANIFEST = {"manifest", RECORD, .of = MANIFEST}, A_FLOOR = {"floor", RECORD, .of = FLOOR};

static bool is_word(const char *words, const node *text) {
  size_t n;
  for (const char *word = words;; word += n + 1) {
    n = strcspn(word, "|");
    if (n == text->length && memcmp(word, text->text, n) == 0) return true;
    if (!word[n]) return false;
  }
}

static bool same_text(const node *a, const node *b) {
  return a->length == b->length && memcmp(a->text, b->text, a->length) == 0;
}

static bool repeats_a_key(const node *record) {
  const node *key = record + 1;
  for (int i = 0; i < record->size; i += 2, key = after(key + 1)) {
    const node *earlier = record + 1;
    for (; earlier < key; earlier = after(earlier + 1))
      if (same_text(earlier, key)) return true;
  }
  return false;
}

/* Return NULL where a value is as its rule says, or the name of the field that isn't. */
static const char *find_fault(const rule *needed, const node *value) {
  static const char KINDS[] = {[TEXT] = '"', [WHOLE] = '0', [REAL] = '0', [LIST] = '[', [MAP] = '{', [RECORD] = '{'};
  const char *name = needed->name ? needed->name : "a value", *below;
  const node *each = value + 1;
  if (value->kind == 'n') return needed->may_be_null ? NULL : name;
  if (needed->kind == FLAG) return value->kind == 't' || value->kind == 'f' ? NULL : name;
  if (value->kind != KINDS[needed->kind]) return name;
  switch (needed->kind) {
    case TEXT:
      if (needed->words && !is_word(needed->words, value)) return name;
      return needed->fits && !needed->fits(value->text, value->length) ? name : NULL;
    case WHOLE:
      if (!value->is_whole) return name;
      return value->number < needed->low || value->number > needed->high ? name : NULL;
    case REAL:
      return !isfinite(value->number) || value->number < needed->low || value->number > needed->high ? name : NULL;
    case LIST:
      if (value->size < needed->low || value->size > needed->high) return name;
      for (int i = 0; i < value->size; i++, each = after(each))
        if (find_fault(needed->of, each)) return name;
      return NULL;
    case MAP:
      for (int i = 0; i < value->size; i += 2, each = after(each + 1))
        if (find_fault(needed->of, each + 1)) return name;
      return repeats_a_key(value) ? name : NULL;
    default:
      break;
  }
  for (int i = 0; i < value->size; i += 2, each = after(each + 1)) {
    const rule *known = needed->of;
    while (known->name && (strlen(known->name) != each->length || memcmp(known->name, each->text, each->length) != 0)) known++;
    if (!known->name) return name;
    if ((below = find_fault(known, each + 1))) return below;
  }
  for (const rule *known = needed->of; known->name; known++)
    if (!known->is_optional && !field(value, known->name)) return known->name;
  return repeats_a_key(value) ? name : NULL;
}

/* Say whether the patients that a manifest encodes, zlib in base64, are those that its number and hash say. */
static bool is_consistent(const node *patients) {
  const node *encoded = field(patients, "encoded");
  uint8_t *packed = malloc(encoded->length / 4 * 3 + 1), bitmap[4096], digest[EVP_MAX_MD_SIZE];
  EVP_MD_CTX *hash = EVP_MD_CTX_new();
  z_stream stream = {0};
  long size = packed ? decode_base64(encoded->text, encoded->length, packed) : -1;
  char line[16], hex[65];
  unsigned patient = 0, n_patients = 0, n_digest = 0;
  int state = Z_OK;
  bool good = size >= 0 && hash && EVP_DigestInit_ex(hash, EVP_sha256(), NULL) == 1 && inflateInit(&stream) == Z_OK;
  bool is_open = good;
  stream.next_in = packed;
  stream.avail_in = good ? (uInt)size : 0;
  while (good && state == Z_OK) {
    stream.next_out = bitmap;
    stream.avail_out = sizeof bitmap;
    state = inflate(&stream, Z_NO_FLUSH);
    good = (state == Z_OK || state == Z_STREAM_END) && stream.total_out <= MAX_PATIENT / 8 + 1;
    for (size_t i = 0; good && i < sizeof bitmap - stream.avail_out; i++)
      for (int bit = 7; bit >= 0; bit--, patient++)
        if (bitmap[i] >> bit & 1) {
          int n = snprintf(line, sizeof line, "%u\n", patient);
          good = good && ++n_patients <= MAX_PATIENTS && EVP_DigestUpdate(hash, line, (size_t)n) == 1;
        }
  }
  good = good && state == Z_STREAM_END && stream.avail_in == 0 && n_patients == field(patients, "n_patients")->number &&
         EVP_DigestFinal_ex(hash, digest, &n_digest) == 1 && n_digest == 32;
  if (good) {
    to_hex(digest, 32, hex);
    good = memcmp(hex, field(patients, "sha256")->text, 64) == 0;
  }
  if (is_open) inflateEnd(&stream);
  EVP_MD_CTX_free(hash);
  free(packed);
  return good;
}

static const node *given(const node *record, const char *name) { /* NULL where it is absent or null */
  const node *value = record ? field(record, name) : NULL;
  return value && value->kind != 'n' ? value : NULL;
}

static double number(const node *record, const char *name, double otherwise) {
  const node *value = given(record, name);
  return value ? value->number : otherwise;
}

static bool holds(const node *list, int step, const node *text) {
  const node *each = list + 1;
  for (int i = 0; i < list->size; i += step, each = after(step == 2 ? each + 1 : each))
    if (same_text(each, text)) return true;
  return false;
}

/* Return NULL where a manifest's fields belong together, or which don't. */
static const char *find_contradiction(const node *manifest) {
  const node *findings = field(manifest, "findings"), *files = field(manifest, "files"), *each;
  const node *target = given(manifest, "target"), *calibration = given(manifest, "calibration");
  const node *dialect = given(manifest, "dialect"), *scope = given(manifest, "scope"), *patients = given(manifest, "trained_on");
  const char *model = target ? "model.plan" : "model.onnx";
  bool is_int8 = strcmp(field(manifest, "precision")->text, "int8") == 0;
  if (files->size != 4 || !field(files, model) || !field(files, "probe.npz")) return "files";
  if (!target != !given(manifest, "engine")) return "target and engine";
  each = findings + 1;
  for (int i = 0; i < findings->size; i++, each = after(each))
    for (const node *earlier = findings + 1; earlier < each; earlier = after(earlier))
      if (same_text(earlier, each)) return "findings";
  if (field(manifest, "head_bias")->size != findings->size) return "head_bias";
  const node *points = field(manifest, "operating_points");
  each = points + 1;
  for (int i = 0; i < points->size; i += 2, each = after(each + 1))
    if (!holds(findings, 1, each)) return "operating_points";
  if (is_int8 != (calibration != NULL)) return "calibration";
  if (calibration && (field(calibration, "logit_mean")->size != findings->size ||
                      field(calibration, "logit_sd")->size != findings->size))
    return "calibration";
  if (is_int8 != (dialect && strcmp(dialect->text, "float") != 0)) return "dialect";
  const node *kept = field(manifest, "float_convolutions"), *weakest = field(manifest, "weakest_convolutions");
  if (!is_int8 && ((kept && kept->size) || (weakest && weakest->size))) return "float_convolutions";
  if (fmod(number(field(manifest, "preprocessing"), "resize_px", 224), 32) != 0) return "resize_px";
  const node *ages = given(scope, "age_years");
  if (ages && ages[1].number > ages[2].number) return "age_years";
  return patients && !is_consistent(patients) ? "trained_on" : NULL;
}

static node *parse_manifest(content raw, const char *where, char *message) {
  node *manifest = parse_json(raw);
  const char *fault = manifest ? find_fault(&A_MANIFEST, manifest) : "not JSON";
  if (!fault) fault = find_contradiction(manifest);
  if (!fault) return manifest;
  fail(message, CHEXNET_BUNDLE_ERROR,
       "%s/manifest.json: found a fault at \"%s\"; needed a manifest of schema 1. Use the version that wrote it, or export again.",
       where, fault);
  free(manifest);
  return NULL;
}

/* ---- releases: the floor file is raised in one step under a lock, and never lowered ---- */

static int read_floor(const char *path, char line[65], int32_t *release, char *message) {
  static const plain_file HOW = {MAX_FLOOR_BYTES, CHEXNET_TRUST_ERROR, true, S_IWOTH};
  content raw;
  int status = read_plain(AT_FDCWD, "", path, HOW, &raw, message);
  if (status) return status;
  node *floor = parse_json(raw);
  if (floor && !find_fault(&A_FLOOR, floor)) {
    snprintf(line, 65, "%s", field(field(floor, "release"), "line")->text);
    *release = (int32_t)field(field(floor, "release"), "number")->number;
  } else {
    status = fail(message, CHEXNET_TRUST_ERROR, "%s is no floor file. Put back the one that was there.", path);
  }
  free(floor);
  free(raw.bytes);
  return status;
}

static int refuse_older(const chexnet_trust *trust, int32_t release, char *message) {
  char line[65];
  int32_t floor;
  if (release < trust->min_release)
    return fail(message, CHEXNET_TRUST_ERROR, "release %d is older than %d, the least that trust lets run. Install a newer one.",
                release, trust->min_release);
  if (!trust->floor_file) return CHEXNET_OK;
  int status = read_floor(trust->floor_file, line, &floor, message);
  if (status) return status;
  if (strcmp(line, trust->line) != 0)
    return fail(message, CHEXNET_TRUST_ERROR, "%s is for the model line %s, not %s. Give each line its own file.",
                trust->floor_file, line, trust->line);
  if (release < floor)
    return fail(message, CHEXNET_TRUST_ERROR, "release %d is older than %d, below which %s lets nothing run. Install a newer one.",
                release, floor, trust->floor_file);
  return CHEXNET_OK;
}

static int check_release(const chexnet_trust *trust, const node *release, const char *where, char *message) {
  if (!trust->line) return CHEXNET_OK;
  if (!release)
    return fail(message, CHEXNET_TRUST_ERROR, "%s names no release, needed one of %s. Export it again with --line.", where,
                trust->line);
  if (strcmp(field(release, "line")->text, trust->line) != 0)
    return fail(message, CHEXNET_TRUST_ERROR, "%s is of the model line %s, needed %s. Install one of that.", where,
                field(release, "line")->text, trust->line);
  return refuse_older(trust, (int32_t)field(release, "number")->number, message);
}

/* Write the floor file anew beside itself, so that it is either the old one or the new one, also after a crash. */
static bool write_floor(int folder, const char *name, const char *line, int32_t release) {
  char partial[64], text[192];
  snprintf(partial, sizeof partial, ".floor.partial-%ld", (long)getpid());
  size_t n = (size_t)snprintf(text, sizeof text, "{\"format\":1,\"release\":{\"line\":\"%s\",\"number\":%d}}\n", line, release);
  unlinkat(folder, partial, 0); /* of a process of this number that was killed; others can't be here under the lock */
  int file = openat(folder, partial, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0644);
  if (file < 0) return false;
  bool good = fchmod(file, 0644) == 0 && write(file, text, n) == (ssize_t)n && fsync(file) == 0;
  good = close(file) == 0 && good && renameat(folder, partial, folder, name) == 0;
  if (!good) unlinkat(folder, partial, 0);
  return good && fsync(folder) == 0;
}

static int raise_floor(const chexnet_trust *trust, int32_t release, char *message) {
  const char *path = trust->floor_file, *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
  char folder_path[PATH_MAX], lock_name[NAME_MAX + 8], line[65];
  int32_t floor;
  int status = read_floor(path, line, &floor, message);
  if (status || (floor == release && strcmp(line, trust->line) == 0)) return status; /* needs no lock and no writable disk */
  size_t n_folder = slash ? (size_t)(slash - path) : 0;
  snprintf(folder_path, sizeof folder_path, "%.*s", (int)n_folder, path);
  if (!slash) snprintf(folder_path, sizeof folder_path, ".");
  if (slash == path) snprintf(folder_path, sizeof folder_path, "/");
  snprintf(lock_name, sizeof lock_name, ".%s.lock", name);
  int folder = open(folder_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  int lock = folder < 0 ? -1 : openat(folder, lock_name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
  status = CHEXNET_TRUST_ERROR;
  bool is_locked = false;
  if (lock < 0) fail(message, status, "%s can't be written: %s. Put the floor file elsewhere.", path, strerror(errno));
  for (int tries = 0; lock >= 0 && !is_locked && tries < 100 * LOCK_TIMEOUT_S; tries++) {
    is_locked = flock(lock, LOCK_EX | LOCK_NB) == 0;
    if (!is_locked) nanosleep(&(struct timespec){0, 10000000}, NULL);
  }
  if (is_locked) {
    status = refuse_older(trust, release, message);
    if (!status) status = read_floor(path, line, &floor, message);
    if (!status && release > floor && !write_floor(folder, name, line, release))
      status = fail(message, CHEXNET_TRUST_ERROR, "%s can't be written: %s. Put the floor file elsewhere.", path, strerror(errno));
  } else if (lock >= 0) {
    fail(message, status, "%s/%s is held by another process. End that one, then try again.", folder_path, lock_name);
  }
  if (lock >= 0) close(lock);
  if (folder >= 0) close(folder);
  return status;
}

/* ---- known answers: probe.npz, a ZIP of three arrays (PKWARE's APPNOTE 6.3.10; NumPy's format 1.0) ---- */

static uint32_t little_endian(const uint8_t *bytes, int n) {
  uint32_t value = 0;
  for (int i = n - 1; i >= 0; i--) value = value << 8 | bytes[i];
  return value;
}

/* Return one member's bytes, to be freed, or NULL. What the directory says is believed where the bytes and their CRC bear it out. */
static uint8_t *unzip(content zip, const char *name, size_t *size) {
  const size_t END = 22, ENTRY = 46, LOCAL = 30, n_wanted = strlen(name);
  const uint8_t *found = NULL;
  if (zip.size < END) return NULL;
  const uint8_t *end = zip.bytes + zip.size - END;
  size_t n_entries = little_endian(end + 10, 2), at = little_endian(end + 16, 4);
  if (memcmp(end, "PK\5\6", 4) != 0 || little_endian(end + 20, 2) || n_entries != 3 ||
      at + (size_t)little_endian(end + 12, 4) != zip.size - END)
    return NULL;
  for (size_t i = 0; i < n_entries; i++) {
    if (at > zip.size || zip.size - at < ENTRY || memcmp(zip.bytes + at, "PK\1\2", 4) != 0) return NULL;
    const uint8_t *entry = zip.bytes + at;
    size_t n_name = little_endian(entry + 28, 2), n_rest = little_endian(entry + 30, 2) + little_endian(entry + 32, 2);
    if (zip.size - at - ENTRY < n_name + n_rest) return NULL;
    if (n_name == n_wanted && memcmp(entry + ENTRY, name, n_name) == 0) found = entry;
    at += ENTRY + n_name + n_rest;
  }
  if (zip.bytes + at != end || !found) return NULL;

  uint32_t version = little_endian(found + 6, 2), flags = little_endian(found + 8, 2), method = little_endian(found + 10, 2);
  size_t packed = little_endian(found + 20, 4), start = little_endian(found + 42, 4);
  *size = little_endian(found + 24, 4);
  if (version > 45 || flags || zip.size < LOCAL || start > zip.size - LOCAL || *size > MAX_PROBE_BYTES) return NULL;
  const uint8_t *local = zip.bytes + start;
  size_t n_name = little_endian(local + 26, 2), n_local = LOCAL + n_name + little_endian(local + 28, 2);
  if (memcmp(local, "PK\3\4", 4) != 0 || n_name != n_wanted || zip.size - start < n_local || packed > zip.size - start - n_local ||
      memcmp(local + LOCAL, name, n_name) != 0)
    return NULL;
  uint8_t *out = malloc(*size + 1);
  if (!out) return NULL;
  bool good = false;
  if (method == 0 && packed == *size) {
    memcpy(out, local + n_local, packed);
    good = true;
  } else if (method == 8) {
    z_stream stream = {.next_in = zip.bytes + start + n_local, .avail_in = (uInt)packed, .next_out = out, .avail_out = (uInt)*size};
    if (inflateInit2(&stream, -MAX_WBITS) == Z_OK) {
      good = inflate(&stream, Z_FINISH) == Z_STREAM_END && stream.total_out == *size && stream.avail_in == 0;
      inflateEnd(&stream);
    }
  }
  out[*size] = 0;
  if (good && crc32(0, out, (uInt)*size) == little_endian(found + 16, 4)) return out;
  free(out);
  return NULL;
}

typedef struct {
  uint8_t *bytes;      /* of the file, to be freed */
  const uint8_t *data; /* in it */
  long shape[4];
  int rank;
} array;

/* Read one array: C order, of a type of so many bytes. */
static bool read_array(content zip, const char *name, const char *type, size_t item_bytes, array *out) {
  size_t size = 0, n_values = 1;
  out->rank = 0;
  out->bytes = unzip(zip, name, &size);
  if (!out->bytes || size < 10 || memcmp(out->bytes, "\x93NUMPY\1\0", 8) != 0) return false;
  size_t n_header = little_endian(out->bytes + 8, 2);
  if (n_header < 1 || n_header > size - 10 || out->bytes[10 + n_header - 1] != '\n') return false;
  char *header = (char *)out->bytes + 10, start[64];
  header[n_header - 1] = 0;
  const char *at = header;
  snprintf(start, sizeof start, "{'descr': '%s', 'fortran_order': False, 'shape': (", type);
  if (!take(&at, start)) return false;
  while (out->rank < 4 && isdigit((unsigned char)*at)) {
    char *rest;
    long extent = strtol(at, &rest, 10);
    if (extent < 1 || extent > 1 << 20 || n_values > MAX_PROBE_BYTES / (size_t)extent) return false;
    n_values *= (size_t)extent;
    out->shape[out->rank++] = extent;
    at = rest;
    if (!take(&at, ", ")) break;
  }
  if (!take(&at, "), }") || strspn(at, " ") != strlen(at)) return false;
  out->data = out->bytes + 10 + n_header;
  return n_values * item_bytes == size - 10 - n_header;
}

typedef struct {
  array pixels, logits, cam; /* uint8 [32, 1, S, S], float32 [32, C], float32 [32, C, S/32, S/32] */
} probe;

static float value_at(const array *floats, size_t i) {
  float value;
  memcpy(&value, floats->data + 4 * i, 4); /* little-endian, as the machines are that this runs on */
  return value;
}

static bool are_finite(const array *floats) {
  size_t n = 1;
  for (int i = 0; i < floats->rank; i++) n *= (size_t)floats->shape[i];
  for (size_t i = 0; i < n; i++)
    if (!isfinite(value_at(floats, i))) return false;
  return true;
}

static void free_probe(probe *known) {
  free(known->pixels.bytes);
  free(known->logits.bytes);
  free(known->cam.bytes);
}

static int read_probe(content zip, const chexnet_model *model, const char *where, probe *known, char *message) {
  *known = (probe){0};
  bool good = read_array(zip, "pixels.npy", "|u1", 1, &known->pixels) && read_array(zip, "logits.npy", "<f4", 4, &known->logits) &&
              read_array(zip, "cam.npy", "<f4", 4, &known->cam);
  const long *pixels = known->pixels.shape, *logits = known->logits.shape, *cam = known->cam.shape;
  if (!good || known->pixels.rank != 4 || known->logits.rank != 2 || known->cam.rank != 4 || logits[0] != N_PROBES ||
      pixels[0] != N_PROBES || pixels[1] != 1 || pixels[2] != pixels[3] || cam[0] != N_PROBES || cam[1] != logits[1] ||
      cam[2] != pixels[2] / 32 || cam[3] != pixels[2] / 32 || !are_finite(&known->logits) || !are_finite(&known->cam))
    return fail(message, CHEXNET_BUNDLE_ERROR,
                "%s/probe.npz does not hold pixels, logits and cam arrays that belong together. Export again.", where);
  if (pixels[2] != model->side_px || logits[1] != model->n_findings)
    return fail(message, CHEXNET_SESSION_ERROR, "%s: known answers are of %ld px and %ld findings, needed %d and %d. Export again.",
                where, pixels[2], logits[1], model->side_px, model->n_findings);
  return CHEXNET_OK;
}

/* ---- pictures ---- */

/* Taps of one output pixel: where they start, how many there are, and their weights in 22-bit fixed point. Pillow's resampling
   (libImaging/Resample.c): the filter is as wide as the reduction, so it averages; computed in double, added in whole numbers. */
typedef struct {
  double scale, support; /* input pixels for each output pixel; half the filter's width in input pixels */
  int n_input;
  bool is_box;           /* else a triangle */
  double *weights;
  int32_t *fixed;
} taps;

#define FIXED_BITS 22

static bool open_taps(taps *t, int n_input, float extent, int n_output, bool is_box) {
  *t = (taps){.scale = (double)extent / n_output, .n_input = n_input, .is_box = is_box};
  t->support = (is_box ? 0.5 : 1.0) * fmax(t->scale, 1.0);
  size_t most = 2 * (size_t)ceil(t->support) + 1;
  t->weights = malloc(most * sizeof *t->weights);
  t->fixed = malloc(most * sizeof *t->fixed);
  return t->weights && t->fixed;
}

static void close_taps(taps *t) {
  free(t->weights);
  free(t->fixed);
}

static int find_taps(const taps *t, int output, int *first) {
  double centre = (output + 0.5) * t->scale, narrow = 1.0 / fmax(t->scale, 1.0), sum = 0.0;
  int start = (int)(centre - t->support + 0.5), end = (int)(centre + t->support + 0.5);
  if (start < 0) start = 0;
  if (end > t->n_input) end = t->n_input;
  for (int i = 0; i < end - start; i++) {
    double at = (i + start - centre + 0.5) * narrow;
    t->weights[i] = t->is_box ? (at > -0.5 && at <= 0.5) : fmax(1.0 - fabs(at), 0.0);
    sum += t->weights[i];
  }
  for (int i = 0; i < end - start; i++) {
    double share = sum != 0.0 ? t->weights[i] / sum : t->weights[i];
    t->fixed[i] = (int32_t)(0.5 + share * (1 << FIXED_BITS));
  }
  *first = start;
  return end - start;
}

static uint8_t rounded(int32_t fixed) {
  fixed >>= FIXED_BITS;
  return (uint8_t)(fixed > 255 ? 255 : fixed);
}

/* [height, width] -> [height, n_output]; extent: how much of the width is taken. */
static bool resize_rows(const uint8_t *in, int height, int width, float extent, int n_output, bool is_box, uint8_t *out) {
  taps t;
  bool good = open_taps(&t, width, extent, n_output, is_box);
  for (int x = 0; good && x < n_output; x++) {
    int first, n = find_taps(&t, x, &first);
    for (int y = 0; y < height; y++) {
      const uint8_t *row = in + (size_t)y * (size_t)width + first;
      int32_t sum = 1 << (FIXED_BITS - 1);
      for (int i = 0; i < n; i++) sum += row[i] * t.fixed[i];
      out[(size_t)y * (size_t)n_output + (size_t)x] = rounded(sum);
    }
  }
  close_taps(&t);
  return good;
}

/* [height, width] -> [n_output, width] */
static bool resize_columns(const uint8_t *in, int height, int width, float extent, int n_output, bool is_box, uint8_t *out) {
  taps t;
  int32_t *sums = malloc((size_t)width * sizeof *sums);
  bool good = open_taps(&t, height, extent, n_output, is_box) && sums;
  for (int y = 0; good && y < n_output; y++) {
    int first, n = find_taps(&t, y, &first);
    for (int x = 0; x < width; x++) sums[x] = 1 << (FIXED_BITS - 1);
    for (int i = 0; i < n; i++) {
      const uint8_t *row = in + (size_t)(first + i) * (size_t)width;
      for (int x = 0; x < width; x++) sums[x] += row[x] * t.fixed[i];
    }
    for (int x = 0; x < width; x++) out[(size_t)y * (size_t)width + (size_t)x] = rounded(sums[x]);
  }
  close_taps(&t);
  free(sums);
  return good;
}

/* [height, width] -> [side, side], the whole picture squashed; extents: how much of it is taken. */
static bool resize(const uint8_t *gray, int height, int width, float tall, float wide, int side, bool is_box, uint8_t *out) {
  bool rows = width != side || wide != (float)side, columns = height != side || tall != (float)side;
  /* The order of Pillow 13, which rounds between the two; Pillow before it takes columns first for fewer pictures. */
  bool columns_first = height > side && height - side > 2 * (int64_t)(width - side);
  size_t n_middle = columns_first ? (size_t)side * (size_t)width : (size_t)height * (size_t)side;
  if (!rows && !columns) {
    memcpy(out, gray, (size_t)side * (size_t)side);
    return true;
  }
  if (!rows) return resize_columns(gray, height, width, tall, side, is_box, out);
  if (!columns) return resize_rows(gray, height, width, wide, side, is_box, out);
  uint8_t *middle = malloc(n_middle);
  bool good = middle != NULL;
  if (good && columns_first)
    good = resize_columns(gray, height, width, tall, side, is_box, middle) &&
           resize_rows(middle, side, width, wide, side, is_box, out);
  else if (good)
    good = resize_rows(gray, height, width, wide, side, is_box, middle) &&
           resize_columns(middle, height, side, tall, side, is_box, out);
  free(middle);
  return good;
}

static int check_picture(const uint8_t *gray, int height, int width, char *message) {
  if (!gray || height < 1 || width < 1 || (int64_t)height * width > MAX_PIXELS)
    return fail(message, CHEXNET_IMAGE_ERROR,
                "shape: found %d x %d px; needed a gray picture, uint8 [height, width], of 1 to %d pixels. Next: check it.", width,
                height, MAX_PIXELS);
  return CHEXNET_OK;
}

int chexnet_resize(const uint8_t *gray, int height, int width, int side_px, uint8_t *pixels, char *message) {
  int status = check_picture(gray, height, width, message);
  if (status) return status;
  if (!pixels || side_px < 32 || side_px > 1024)
    return fail(message, CHEXNET_IMAGE_ERROR, "side: found %d px; needed 32 to 1024. Next: take the model's side_px.", side_px);
  if (!resize(gray, height, width, (float)height, (float)width, side_px, false, pixels))
    return fail(message, CHEXNET_IMAGE_ERROR, "busy: " NO_MEMORY);
  return CHEXNET_OK;
}

/* What a picture must be: chexnet_deploy/images/content_check.py, where each rule has its reason. */
typedef struct {
  bool is_guarded;
  double min_side_px, max_aspect, min_gray_levels, max_black_or_white_share, min_score;
} guard;

enum { THUMBNAIL = 64, CELLS = 8, DIRECTIONS = 8, N_EDGES = DIRECTIONS * CELLS * CELLS };

static const double SCORE_BIAS = -0.9048;
static const int16_t SCORE_WEIGHTS[N_EDGES] = { /* of content_check.json, times 10,000 */
    131, -333, -442, -152, 255, 17, -497, -239, -370, -711, 401, 456, 232, -135, -314, 207, 206, -807, 502, -86, 566, 261,
    459, 498, 615, -80, 822, 729, 357, 894, 738, 330, 448, 646, 408, 452, -229, 320, 499, 53, 163, 1088, 45, -343, -767,
    -391, 181, 302, 200, 1129, 237, -271, -763, -478, 10, 134, -22, -73, -358, -559, -350, -221, -10, 234, 737, 973, 164,
    690, 203, 690, 826, -249, 554, 908, 742, 914, -36, -166, -18, -504, 260, 94, 1145, 1207, 586, -158, 78, -184, -176, 608,
    1484, 1581, 565, -105, 205, -432, 130, 820, 730, 1302, -153, -286, -102, -300, 41, -196, 944, 222, -427, -532, -595,
    -206, 452, 170, 915, 352, -374, -187, -679, -625, -252, -67, 588, 688, 103, -134, -179, -756, 544, 217, 164, 39, 39,
    164, 217, 544, 332, 1504, 387, -363, -363, 387, 1504, 332, 208, 752, 83, -156, -156, 83, 752, 208, -90, 262, 103, -506,
    -506, 103, 262, -90, -33, 423, 362, -421, -421, 362, 423, -33, 80, 230, 210, -122, -122, 210, 230, 80, -89, -53, 335,
    -217, -217, 335, -53, -89, 70, 140, -6, -343, -343, -6, 140, 70, -249, 826, 690, 203, 690, 164, 973, 737, -504, -18,
    -166, -36, 914, 742, 908, 554, -184, 78, -158, 586, 1207, 1145, 94, 260, -432, 205, -105, 565, 1581, 1484, 608, -176,
    -300, -102, -286, -153, 1302, 730, 820, 130, -206, -595, -532, -427, 222, 944, -196, 41, -625, -679, -187, -374, 352,
    915, 170, 452, -756, -179, -134, 103, 688, 588, -67, -252, -239, -497, 17, 255, -152, -442, -333, 131, 207, -314, -135,
    232, 456, 401, -711, -370, 498, 459, 261, 566, -86, 502, -807, 206, 330, 738, 894, 357, 729, 822, -80, 615, 53, 499,
    320, -229, 452, 408, 646, 448, 302, 181, -391, -767, -343, 45, 1088, 163, 134, 10, -478, -763, -271, 237, 1129, 200,
    234, -10, -221, -350, -559, -358, -73, -22, -358, 613, 214, 104, -11, -83, -979, -538, 99, 611, 380, 399, 246, 425,
    -515, -367, 423, 968, 702, -331, 144, -128, 101, -118, 483, 774, 417, -1284, -106, -477, -12, -183, 340, 76, -185,
    -1198, -641, -629, -185, -145, 299, 17, -734, -1236, -719, -1074, -208, -133, 131, -131, -1186, -1552, -1181, -1244,
    -98, 642, -378, -281, -724, -1498, -1459, -876, -655, 263, 351, 8, -24, -51, -51, -24, 8, 351, -131, -416, -779, -398,
    -398, -779, -416, -131, -570, -221, -402, -368, -368, -402, -221, -570, -715, -377, -315, -420, -420, -315, -377, -715,
    -491, -389, -617, -601, -601, -617, -389, -491, -709, -565, -741, -685, -685, -741, -565, -709, -253, -154, -431, -439,
    -439, -431, -154, -253, -53, 211, 137, -34, -34, 137, 211, -53, -538, -979, -83, -11, 104, 214, 613, -358, -367, -515,
    425, 246, 399, 380, 611, 99, -118, 101, -128, 144, -331, 702, 968, 423, -183, -12, -477, -106, -1284, 417, 774, 483,
    -145, -185, -629, -641, -1198, -185, 76, 340, -133, -208, -1074, -719, -1236, -734, 17, 299, 642, -98, -1244, -1181,
    -1552, -1186, -131, 131, 263, -655, -876, -1459, -1498, -724, -281, -378,
};

/* Averages over blocks of whole pixels, Pillow's Image.reduce: sums divided by a fixed-point reciprocal made in float. */
static void reduce(const uint8_t *gray, int height, int width, int tall, int wide, uint8_t *out) {
  for (int top = 0; top < height; top += tall)
    for (int left = 0; left < width; left += wide) {
      int bottom = height - top < tall ? height : top + tall, right = width - left < wide ? width : left + wide;
      uint32_t n = (uint32_t)(bottom - top) * (uint32_t)(right - left), sum = n / 2;
      for (int y = top; y < bottom; y++)
        for (int x = left; x < right; x++) sum += gray[(size_t)y * (size_t)width + (size_t)x];
      *out++ = (uint8_t)(sum * (uint32_t)(4294967296.0f / (float)(256 * n)) >> 24);
    }
}

static bool make_thumbnail(const uint8_t *gray, int height, int width, uint8_t out[THUMBNAIL * THUMBNAIL]) {
  int tall = height < 2 * THUMBNAIL ? 1 : height / THUMBNAIL, wide = width < 2 * THUMBNAIL ? 1 : width / THUMBNAIL;
  if (tall == 1 && wide == 1) return resize(gray, height, width, (float)height, (float)width, THUMBNAIL, true, out);
  int small_height = (height + tall - 1) / tall, small_width = (width + wide - 1) / wide;
  uint8_t *small = malloc((size_t)small_height * (size_t)small_width);
  if (!small) return false;
  reduce(gray, height, width, tall, wide, small);
  bool good = resize(small, small_height, small_width, (float)((double)height / tall), (float)((double)width / wide), THUMBNAIL,
                     true, out);
  free(small);
  return good;
}

static int by_value(const void *a, const void *b) { return *(const uint8_t *)a - *(const uint8_t *)b; }

/* Histograms of the directions in which a thumbnail gets brighter, by cell: [direction][row][column]. */
static void find_edges(const uint8_t *small, double edges[N_EDGES]) {
  const int n = THUMBNAIL, cell_px = THUMBNAIL / CELLS;
  double mean = 0, variance = 0;
  for (int i = 0; i < n * n; i++) mean += small[i];
  mean /= n * n;
  for (int i = 0; i < n * n; i++) variance += (small[i] - mean) * (small[i] - mean);
  double sd = sqrt(variance / (n * n));
  if (sd == 0) sd = 1;
  for (int i = 0; i < N_EDGES; i++) edges[i] = 0;
  for (int y = 0; y < n; y++)
    for (int x = 0; x < n; x++) {
      double right = (small[y * n + (x + 1 < n ? x + 1 : x)] / sd - small[y * n + (x ? x - 1 : x)] / sd) / 2;
      double down = (small[(y + 1 < n ? y + 1 : y) * n + x] / sd - small[(y ? y - 1 : y) * n + x] / sd) / 2;
      double strength = hypot(right, down), direction = atan2(down, right) * (DIRECTIONS / (2 * 3.14159265358979323846));
      int below = (int)floor(direction), cell = y / cell_px * CELLS + x / cell_px;
      edges[(below + DIRECTIONS) % DIRECTIONS * CELLS * CELLS + cell] += strength * (1 - (direction - below));
      edges[(below + 1 + DIRECTIONS) % DIRECTIONS * CELLS * CELLS + cell] += strength * (direction - below);
    }
  for (int cell = 0; cell < CELLS * CELLS; cell++) {
    double power = 0;
    for (int d = 0; d < DIRECTIONS; d++) {
      edges[d * CELLS * CELLS + cell] /= cell_px * cell_px;
      power += edges[d * CELLS * CELLS + cell] * edges[d * CELLS * CELLS + cell];
    }
    for (int d = 0; d < DIRECTIONS; d++) edges[d * CELLS * CELLS + cell] /= sqrt(power + 0.1 * 0.1);
  }
}

static double *score_turns(const double *edges, double scores[8]) {
  for (int turn = 0; turn < 8; turn++) {
    scores[turn] = SCORE_BIAS;
    for (int d = 0; d < DIRECTIONS; d++)
      for (int row = 0; row < CELLS; row++)
        for (int column = 0; column < CELLS; column++) {
          /* Where the edge that comes to lie here was: so many quarter turns counterclockwise ago, and in the negative. */
          int from_d = (d + 2 * (turn % 4) + 4 * (turn / 4)) % DIRECTIONS, from_row = row, from_column = column;
          for (int quarter = 0; quarter < turn % 4; quarter++) {
            int former = from_row;
            from_row = from_column;
            from_column = CELLS - 1 - former;
          }
          scores[turn] += SCORE_WEIGHTS[(d * CELLS + row) * CELLS + column] / 10000.0 *
                          edges[(from_d * CELLS + from_row) * CELLS + from_column];
        }
  }
  return scores;
}

static int check_content(const guard *policy, const uint8_t *gray, int height, int width, char *message) {
  static const char *const TURNS[] = {"upright", "turned-clockwise", "upside-down", "turned-counterclockwise", "inverted",
                                      "inverted-and-turned-clockwise", "inverted-and-upside-down",
                                      "inverted-and-turned-counterclockwise"};
  static const struct {
    double share;
    int n_grays;
  } BLANK[] = {{0.8, 8}, {0.9, 16}};
  const int n = THUMBNAIL * THUMBNAIL, shorter = height < width ? height : width, longer = height < width ? width : height;
  uint8_t small[THUMBNAIL * THUMBNAIL], sorted[THUMBNAIL * THUMBNAIL];
  double edges[N_EDGES], scores[8];
  if (policy->is_guarded && shorter < policy->min_side_px)
    return fail(message, CHEXNET_IMAGE_ERROR, "too-small: found %d x %d px; needed sides of at least %g px. Next: export it whole.",
                width, height, policy->min_side_px);
  if (policy->is_guarded && longer > policy->max_aspect * shorter)
    return fail(message, CHEXNET_IMAGE_ERROR,
                "extreme-aspect: found %d x %d px; needed sides that differ by at most %g times. Next: check that it is whole.",
                width, height, policy->max_aspect);
  if (!make_thumbnail(gray, height, width, small)) return fail(message, CHEXNET_IMAGE_ERROR, "busy: " NO_MEMORY);
  memcpy(sorted, small, sizeof sorted);
  qsort(sorted, (size_t)n, 1, by_value);
  for (int k = 0; k < 2; k++) {
    int n_share = (int)ceil(BLANK[k].share * n);
    for (int i = 0; i + n_share <= n; i++)
      if (sorted[i + n_share - 1] - sorted[i] <= BLANK[k].n_grays)
        return fail(message, CHEXNET_IMAGE_ERROR,
                    "blank: found almost nothing, %.0f%% of it within %d of 255 grays; needed a radiograph. Next: check the exposure.",
                    100 * BLANK[k].share, BLANK[k].n_grays);
  }
  if (!policy->is_guarded) return CHEXNET_OK;
  int step = (shorter + 511) / 512, counts[256] = {0}, n_levels = 0, n_sampled = 0;
  for (int y = 0; y < height; y += step)
    for (int x = 0; x < width; x += step, n_sampled++) counts[gray[(size_t)y * (size_t)width + (size_t)x]]++;
  for (int i = 0; i < 256; i++) n_levels += counts[i] > 0;
  if (n_levels < policy->min_gray_levels)
    return fail(message, CHEXNET_IMAGE_ERROR, "too-few-gray-levels: found %d grays; needed at least %g. Next: export it itself.",
                n_levels, policy->min_gray_levels);
  double share = (double)(counts[0] + counts[255]) / n_sampled;
  if (share > policy->max_black_or_white_share)
    return fail(message, CHEXNET_IMAGE_ERROR,
                "mostly-black-or-white: found %.0f%% black or white; needed at most %.0f%%. Next: check the gray window.", 100 * share,
                100 * policy->max_black_or_white_share);
  find_edges(small, edges);
  score_turns(edges, scores);
  int best = 0;
  for (int turn = 1; turn < 8; turn++)
    if (scores[turn] > scores[best]) best = turn;
  if (scores[best] < policy->min_score)
    return fail(message, CHEXNET_IMAGE_ERROR,
                "not-a-frontal-chest: found a picture that scores %.2f at best; needed %g. Next: check view and body part.",
                scores[best], policy->min_score);
  if (best)
    return fail(message, CHEXNET_IMAGE_ERROR,
                "%s: found what looks like a chest that lies so; needed it upright, with bone bright. Next: look at it.", TURNS[best]);
  return CHEXNET_OK;
}

/* ---- backends ---- */

static size_t n_values(const chexnet_model *model, bool is_map) {
  size_t cells = (size_t)model->side_px / 32;
  return (size_t)model->n_findings * (is_map ? cells * cells : 1);
}

#if defined(CHEXNET_OPENVINO) || defined(CHEXNET_ONNXRUNTIME)
/* An output must be float of exactly these extents: it is copied into what was made for them. */
static bool is_shape(const int64_t *extents, size_t rank, const chexnet_model *model, bool is_map) {
  int64_t cells = model->side_px / 32;
  if (rank != (is_map ? 4 : 2) || extents[0] != 1 || extents[1] != model->n_findings) return false;
  return !is_map || (extents[2] == cells && extents[3] == cells);
}

#define OTHER_SHAPE "the model's output \"%s\" is of another type or shape than its manifest says. Export it again."
#endif

#ifdef CHEXNET_OPENVINO
#include <openvino/c/openvino.h>

typedef struct {
  const chexnet_model *model;
  ov_core_t *core;
  ov_compiled_model_t *compiled;
  ov_infer_request_t *request;
} openvino_session;

static int openvino_failed(ov_status_e status, char *message) {
  if (status == OK) return 0;
  const char *words = ov_get_last_err_msg(); /* to be freed, where there are any */
  fail(message, CHEXNET_SESSION_ERROR, "OpenVINO failed: %s (%d). Check its version, or that the model is for it.",
       words && *words ? words : "no reason given", (int)status);
  if (words) ov_free(words);
  return 1;
}

static int openvino_open(const chexnet_model *model, void *bytes, size_t n_bytes, int threads, void **out, char *message) {
  openvino_session *session = calloc(1, sizeof *session);
  const int64_t extents[] = {1, 1, model->side_px, model->side_px};
  ov_partial_shape_t shape = {0};
  ov_model_t *read = NULL;
  char n_threads[16];
  if (!session) {
    free(bytes);
    return fail(message, 1, NO_MEMORY);
  }
  *out = session;
  session->model = model;
  snprintf(n_threads, sizeof n_threads, "%d", threads);
  /* bfloat16, which OpenVINO takes for floats where the CPU has it unless told not to, has 8 bits of mantissa. */
  int failed = openvino_failed(ov_core_create(&session->core), message) ||
               openvino_failed(ov_core_read_model_from_memory_buffer(session->core, bytes, n_bytes, NULL, &read), message);
  free(bytes);
  failed = failed || openvino_failed(ov_partial_shape_create_static(4, extents, &shape), message) ||
           openvino_failed(ov_model_reshape_single_input(read, shape), message) ||
           openvino_failed(ov_core_compile_model(session->core, read, "CPU", 6, &session->compiled, "INFERENCE_NUM_THREADS",
                                                     n_threads, "NUM_STREAMS", "1", "INFERENCE_PRECISION_HINT", "f32"),
                               message) ||
               openvino_failed(ov_compiled_model_create_infer_request(session->compiled, &session->request), message);
  if (shape.dims) ov_partial_shape_free(&shape);
  if (read) ov_model_free(read);
  return failed;
}

static int openvino_read(openvino_session *session, const char *name, bool is_map, float *out, char *message) {
  ov_tensor_t *tensor = NULL;
  ov_shape_t shape = {0};
  ov_element_type_e type;
  void *data;
  int failed = openvino_failed(ov_infer_request_get_tensor(session->request, name, &tensor), message) ||
               openvino_failed(ov_tensor_get_shape(tensor, &shape), message) ||
               openvino_failed(ov_tensor_get_element_type(tensor, &type), message) ||
               openvino_failed(ov_tensor_data(tensor, &data), message);
  if (!failed && (type != F32 || !is_shape(shape.dims, (size_t)shape.rank, session->model, is_map)))
    failed = fail(message, 1, OTHER_SHAPE, name);
  if (!failed) memcpy(out, data, n_values(session->model, is_map) * sizeof *out);
  if (shape.dims) ov_shape_free(&shape);
  if (tensor) ov_tensor_free(tensor);
  return failed;
}

static int openvino_run(void *opened, const uint8_t *pixels, float *logits, float *maps, char *message) {
  openvino_session *session = opened;
  ov_tensor_t *input = NULL;
  void *data;
  size_t size = 0, needed = (size_t)session->model->side_px * (size_t)session->model->side_px;
  int failed = openvino_failed(ov_infer_request_get_input_tensor(session->request, &input), message) ||
               openvino_failed(ov_tensor_get_byte_size(input, &size), message) ||
               openvino_failed(ov_tensor_data(input, &data), message);
  if (!failed && size != needed) failed = fail(message, 1, OTHER_SHAPE, "pixels");
  if (!failed) memcpy(data, pixels, size);
  failed = failed || openvino_failed(ov_infer_request_infer(session->request), message) ||
           openvino_read(session, "logits", false, logits, message) || openvino_read(session, "cam", true, maps, message);
  if (input) ov_tensor_free(input);
  return failed;
}

static void openvino_close(void *opened) {
  openvino_session *session = opened;
  if (session->request) ov_infer_request_free(session->request);
  if (session->compiled) ov_compiled_model_free(session->compiled);
  if (session->core) ov_core_free(session->core);
  free(session);
}

const chexnet_backend chexnet_openvino = {"model.onnx", openvino_open, openvino_run, openvino_close};
#endif

#ifdef CHEXNET_ONNXRUNTIME
/* What is used of onnxruntime_c_api.h, which Python's packages of ONNX Runtime lack: a table of functions that only grows. */
typedef struct OrtStatus OrtStatus;
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct {
  void *unused_0[2];
  const char *(*GetErrorMessage)(const OrtStatus *);
  OrtStatus *(*CreateEnv)(int log_level, const char *log_id, OrtEnv **);
  void *unused_4[4];
  OrtStatus *(*CreateSessionFromArray)(const OrtEnv *, const void *, size_t, const OrtSessionOptions *, OrtSession **);
  OrtStatus *(*Run)(OrtSession *, const void *run_options, const char *const *input_names, const OrtValue *const *inputs,
                    size_t n_inputs, const char *const *output_names, size_t n_outputs, OrtValue **outputs);
  OrtStatus *(*CreateSessionOptions)(OrtSessionOptions **);
  void *unused_11[11];
  OrtStatus *(*SetSessionLogSeverityLevel)(OrtSessionOptions *, int log_level);
  void *unused_23[1];
  OrtStatus *(*SetIntraOpNumThreads)(OrtSessionOptions *, int);
  void *unused_25[24];
  OrtStatus *(*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo *, void *, size_t n_bytes, const int64_t *extents, size_t rank,
                                               int type, OrtValue **);
  void *unused_50[1];
  OrtStatus *(*GetTensorMutableData)(OrtValue *, void **);
  void *unused_52[8];
  OrtStatus *(*GetTensorElementType)(const OrtTensorTypeAndShapeInfo *, int *type);
  OrtStatus *(*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo *, size_t *);
  OrtStatus *(*GetDimensions)(const OrtTensorTypeAndShapeInfo *, int64_t *extents, size_t rank);
  void *unused_63[2];
  OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *, OrtTensorTypeAndShapeInfo **);
  void *unused_66[3];
  OrtStatus *(*CreateCpuMemoryInfo)(int allocator, int memory, OrtMemoryInfo **);
  void *unused_70[22];
  void (*ReleaseEnv)(OrtEnv *);
  void (*ReleaseStatus)(OrtStatus *);
  void (*ReleaseMemoryInfo)(OrtMemoryInfo *);
  void (*ReleaseSession)(OrtSession *);
  void (*ReleaseValue)(OrtValue *);
  void *unused_97[2];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *);
  void (*ReleaseSessionOptions)(OrtSessionOptions *);
} OrtApi;
_Static_assert(offsetof(OrtApi, ReleaseSessionOptions) == 100 * sizeof(void *), "a place in ONNX Runtime's table is wrong");
typedef struct {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;
const OrtApiBase *OrtGetApiBase(void);

enum { ORT_API_VERSION = 20, ORT_LOG_ERRORS_ONLY = 3, ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_DEVICE_ALLOCATOR = 0, ORT_MEMORY_DEFAULT = 0 };

typedef struct {
  const chexnet_model *model;
  const OrtApi *api;
  OrtEnv *environment;
  OrtSession *session;
  OrtMemoryInfo *memory;
} ort_session;

static int ort_failed(const OrtApi *api, OrtStatus *status, char *message) {
  if (!status) return 0;
  fail(message, CHEXNET_SESSION_ERROR, "ONNX Runtime failed: %s. Check its version, or that the model is for it.",
       api->GetErrorMessage(status));
  api->ReleaseStatus(status);
  return 1;
}

static int ort_load(const chexnet_model *model, const void *bytes, size_t n_bytes, int threads, void **out, char *message) {
  /* From 1.29 on ONNX Runtime reports models and machines to its maker, unless told not to before it starts. */
  if (setenv("ORT_DISABLE_TELEMETRY", "1", 0) != 0) return fail(message, 1, NO_MEMORY);
  const OrtApiBase *base = OrtGetApiBase();
  const OrtApi *api = base->GetApi(ORT_API_VERSION);
  const char *version = base->GetVersionString();
  if (!api) return fail(message, 1, "ONNX Runtime is %s, needed 1.%d or later. Install that.", version, ORT_API_VERSION);
  long major = strtol(version, NULL, 10), minor = strchr(version, '.') ? strtol(strchr(version, '.') + 1, NULL, 10) : 0;
  bool has_float16 = strcmp(model->dialect, "typed") == 0 || strcmp(model->dialect, "mixed") == 0;
  if (has_float16 && major == 1 && minor < 30)
    return fail(message, 1,
                "ONNX Runtime %s truncates where int8 of the %s dialect must round, and answers wrongly. Install 1.30 or later, or "
                "use fp32, fp16 or another dialect.",
                version, model->dialect);
  ort_session *session = calloc(1, sizeof *session);
  OrtSessionOptions *options = NULL;
  if (!session) return fail(message, 1, NO_MEMORY);
  *out = session;
  session->model = model;
  session->api = api;
  int failed = ort_failed(api, api->CreateEnv(ORT_LOG_ERRORS_ONLY, "chexnet", &session->environment), message) ||
               ort_failed(api, api->CreateSessionOptions(&options), message) ||
               ort_failed(api, api->SetSessionLogSeverityLevel(options, ORT_LOG_ERRORS_ONLY), message) ||
               ort_failed(api, api->SetIntraOpNumThreads(options, threads), message) ||
               ort_failed(api, api->CreateSessionFromArray(session->environment, bytes, n_bytes, options, &session->session), message) ||
               ort_failed(api, api->CreateCpuMemoryInfo(ORT_DEVICE_ALLOCATOR, ORT_MEMORY_DEFAULT, &session->memory), message);
  if (options) api->ReleaseSessionOptions(options);
  return failed;
}

static int ort_open(const chexnet_model *model, void *bytes, size_t n_bytes, int threads, void **out, char *message) {
  int failed = ort_load(model, bytes, n_bytes, threads, out, message);
  free(bytes);
  return failed;
}

static int ort_read(ort_session *session, OrtValue *value, const char *name, bool is_map, float *out, char *message) {
  const OrtApi *api = session->api;
  OrtTensorTypeAndShapeInfo *info = NULL;
  int64_t extents[4];
  size_t rank = 0;
  int type = 0;
  void *data;
  int failed = ort_failed(api, api->GetTensorTypeAndShape(value, &info), message) ||
               ort_failed(api, api->GetTensorElementType(info, &type), message) ||
               ort_failed(api, api->GetDimensionsCount(info, &rank), message);
  failed = failed || (rank <= 4 && ort_failed(api, api->GetDimensions(info, extents, rank), message)) ||
           ort_failed(api, api->GetTensorMutableData(value, &data), message);
  if (!failed && (type != ORT_FLOAT || !is_shape(extents, rank, session->model, is_map)))
    failed = fail(message, 1, OTHER_SHAPE, name);
  if (!failed) memcpy(out, data, n_values(session->model, is_map) * sizeof *out);
  if (info) api->ReleaseTensorTypeAndShapeInfo(info);
  return failed;
}

static int ort_run(void *opened, const uint8_t *pixels, float *logits, float *maps, char *message) {
  static const char *const INPUTS[] = {"pixels"}, *const OUTPUTS[] = {"logits", "cam"};
  ort_session *session = opened;
  const OrtApi *api = session->api;
  const int64_t extents[] = {1, 1, session->model->side_px, session->model->side_px};
  OrtValue *input = NULL, *outputs[2] = {NULL, NULL};
  int failed = ort_failed(api, api->CreateTensorWithDataAsOrtValue(session->memory, (void *)(uintptr_t)pixels,
                                                                   (size_t)(extents[2] * extents[3]), extents, 4, ORT_UINT8, &input), message);
  const OrtValue *inputs[] = {input};
  failed = failed || ort_failed(api, api->Run(session->session, NULL, INPUTS, inputs, 1, OUTPUTS, 2, outputs), message) ||
           ort_read(session, outputs[0], OUTPUTS[0], false, logits, message) ||
           ort_read(session, outputs[1], OUTPUTS[1], true, maps, message);
  for (int i = 0; i < 2; i++)
    if (outputs[i]) api->ReleaseValue(outputs[i]);
  if (input) api->ReleaseValue(input);
  return failed;
}

static void ort_close(void *opened) {
  ort_session *session = opened;
  if (session->memory) session->api->ReleaseMemoryInfo(session->memory);
  if (session->session) session->api->ReleaseSession(session->session);
  if (session->environment) session->api->ReleaseEnv(session->environment);
  free(session);
}

const chexnet_backend chexnet_onnxruntime = {"model.onnx", ort_open, ort_run, ort_close};
#endif

/* ---- what the header declares ---- */

struct chexnet {
  chexnet_model model;
  guard policy;
  node *manifest; /* into raw */
  content raw;
  const char **findings;
  double *operating_points, *head_bias;
  const chexnet_backend *backend;
  void *session;
  uint8_t *pixels;
  float *logits, *probabilities, *maps;
  signed char *present;
};

enum { HAS_SIGNATURE = 1, HAS_ONNX = 2, HAS_PLAN = 4 };

/* Refuse what no bundle holds, and note in `found` what some do. Attestations are for Python's trust files; here nobody asks for one. */
static int list_files(int folder, const char *where, int *found, char *message) {
  static const struct {
    const char *name;
    int bit;
  } KNOWN[] = {{"manifest.json", 0}, {"manifest.sha256", 0}, {"manifest.sig", HAS_SIGNATURE},
               {"model.onnx", HAS_ONNX}, {"model.plan", HAS_PLAN}, {"probe.npz", 0},
               {"attestation.json", 0}, {"attestation.sig", 0}};
  const size_t n = sizeof KNOWN / sizeof *KNOWN;
  int copy = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), status = CHEXNET_OK;
  DIR *listing = copy < 0 ? NULL : fdopendir(copy);
  if (!listing) {
    if (copy >= 0) close(copy);
    return fail(message, CHEXNET_BUNDLE_ERROR, "%s can't be read: %s. Check the disk.", where, strerror(errno));
  }
  *found = 0;
  for (;;) {
    errno = 0;
    struct dirent *entry = readdir(listing);
    if (!entry && errno) status = fail(message, CHEXNET_BUNDLE_ERROR, "%s can't be read: %s. Check the disk.", where, strerror(errno));
    if (!entry) break;
    if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
    size_t i = 0;
    while (i < n && strcmp(KNOWN[i].name, entry->d_name) != 0) i++;
    if (i == n) {
      status = fail(message, CHEXNET_BUNDLE_ERROR, "%s holds '%.64s', which its manifest does not name. Remove or re-export.", where,
                    entry->d_name);
      break;
    }
    *found |= KNOWN[i].bit;
  }
  closedir(listing);
  return status;
}

/* Read a file that the manifest names, and compare its hash with the manifest's. */
static int read_listed(int folder, const char *where, const char *name, size_t limit, const node *manifest, content *out,
                       char *message) {
  const plain_file how = {limit, CHEXNET_BUNDLE_ERROR, false, 0};
  char actual[65];
  int status = read_plain(folder, where, name, how, out, message);
  if (status) return status;
  const char *stated = field(field(manifest, "files"), name)->text;
  if (sha256_hex(out->bytes, out->size, actual) && strcmp(actual, stated) == 0) return CHEXNET_OK;
  free(out->bytes);
  out->bytes = NULL;
  return fail(message, CHEXNET_BUNDLE_ERROR, "%s/%s does not match its manifest: expected sha256 %.12s. " AGAIN, where, name, stated);
}

/* A site's own operating points stand in for the bundle's, and only Python reads them: to decide by others would be wrong unseen. */
static int refuse_site(const char *where, char *message) {
  char folder[PATH_MAX], site[PATH_MAX + sizeof ".site.json"];
  struct stat ignored;
  if (!realpath(where, folder)) return fail(message, CHEXNET_BUNDLE_ERROR, "%s can't be read: %s. Check the disk.", where, strerror(errno));
  snprintf(site, sizeof site, "%s.site.json", folder);
  if (lstat(site, &ignored) != 0) return CHEXNET_OK;
  return fail(message, CHEXNET_BUNDLE_ERROR, "%s is there, and this runtime reads no site files. Use Python's, or a copy of the bundle without it.",
              site);
}

static bool keep_fields(chexnet *bundle) {
  const node *manifest = bundle->manifest, *findings = field(manifest, "findings"), *each = findings + 1;
  const node *points = field(manifest, "operating_points"), *biases = field(manifest, "head_bias");
  const node *picture = given(given(manifest, "scope"), "picture"), *word = given(picture, "guard"), *dialect = given(manifest, "dialect");
  chexnet_model *model = &bundle->model;
  model->side_px = (int)number(field(manifest, "preprocessing"), "resize_px", 224);
  model->n_findings = findings->size;
  model->dialect = dialect ? dialect->text : "float";
  size_t n = (size_t)findings->size, n_maps = n_values(model, true), n_pixels = (size_t)model->side_px * (size_t)model->side_px;
  bundle->findings = calloc(n, sizeof *bundle->findings);
  bundle->operating_points = calloc(n, sizeof(double));
  bundle->head_bias = calloc(n, sizeof(double));
  bundle->pixels = calloc(n_pixels, 1);
  bundle->logits = calloc(n, sizeof(float));
  bundle->probabilities = calloc(n, sizeof(float));
  bundle->maps = calloc(n_maps, sizeof(float));
  bundle->present = calloc(n, 1);
  if (!bundle->findings || !bundle->operating_points || !bundle->head_bias || !bundle->pixels || !bundle->logits ||
      !bundle->probabilities || !bundle->maps || !bundle->present)
    return false;
  for (size_t i = 0; i < n; i++, each = after(each)) {
    const node *point = field(points, each->text);
    bundle->findings[i] = each->text;
    bundle->operating_points[i] = point ? point->number : -1.0;
    bundle->head_bias[i] = biases[1 + i].number;
  }
  model->findings = bundle->findings;
  model->operating_points = bundle->operating_points;
  /* A picture in the scope is guarded unless it says not to; a scope without one, or none, guards nothing. */
  bundle->policy.is_guarded = picture && !(word && strcmp(word->text, "off") == 0);
  bundle->policy.min_side_px = number(picture, "min_side_px", 224);
  bundle->policy.max_aspect = number(picture, "max_aspect", 1.6);
  bundle->policy.min_gray_levels = number(picture, "min_gray_levels", 64);
  bundle->policy.max_black_or_white_share = number(picture, "max_black_or_white_share", 0.75);
  bundle->policy.min_score = number(picture, "min_score", 0.39);
  return true;
}

/* Verify every byte, in the Python runtime's order; leaves the model and the known answers, to be freed also after a failure. */
static int verify(chexnet *bundle, int folder, const char *where, const chexnet_trust *trust, content *model, content *known,
                  char *message) {
  static const plain_file MANIFEST_FILE = {MAX_MANIFEST_BYTES, CHEXNET_BUNDLE_ERROR, false, 0};
  static const plain_file HASH_FILE = {256, CHEXNET_BUNDLE_ERROR, false, 0};
  static const plain_file SIGNATURE_FILE = {MAX_SIGNATURE_BYTES, CHEXNET_TRUST_ERROR, false, 0};
  content stated = {0}, signatures = {0};
  public_key keys[MAX_KEYS];
  int found = 0, status;
  if (trust && (status = read_trust(trust, keys, message))) return status;
  if ((status = read_plain(folder, where, "manifest.json", MANIFEST_FILE, &bundle->raw, message))) return status;
  if (!sha256_hex(bundle->raw.bytes, bundle->raw.size, bundle->model.id)) return fail(message, CHEXNET_BUNDLE_ERROR, NO_MEMORY);
  if ((status = read_plain(folder, where, "manifest.sha256", HASH_FILE, &stated, message))) return status;
  bool is_same = stated.size == 65 && memcmp(stated.bytes, bundle->model.id, 64) == 0 && stated.bytes[64] == '\n';
  free(stated.bytes);
  if (!is_same)
    return fail(message, CHEXNET_BUNDLE_ERROR, "%s/manifest.json was changed after it was written: its sha256 is %.12s. " AGAIN, where,
                bundle->model.id);
  if ((status = list_files(folder, where, &found, message))) return status;
  if ((status = refuse_site(where, message))) return status;
  if (trust) { /* before it is parsed: what nobody vouches for gets to no parser */
    if (!(found & HAS_SIGNATURE))
      return fail(message, CHEXNET_TRUST_ERROR, "%s is not signed; needed a signature by a trusted key. Take the signed bundle.", where);
    if ((status = read_plain(folder, where, "manifest.sig", SIGNATURE_FILE, &signatures, message))) return status;
    status = check_signature(trust, keys, bundle->raw, signatures, where, message);
    free(signatures.bytes);
    if (status) return status;
  }
  if (!(bundle->manifest = parse_manifest(bundle->raw, where, message))) return CHEXNET_BUNDLE_ERROR;
  if (trust && (status = check_release(trust, given(bundle->manifest, "release"), where, message))) return status;
  bool is_plan = given(bundle->manifest, "target") != NULL;
  const char *name = is_plan ? "model.plan" : "model.onnx";
  if (found & (is_plan ? HAS_ONNX : HAS_PLAN))
    return fail(message, CHEXNET_BUNDLE_ERROR, "%s holds a second model, which its manifest does not name. Remove or re-export.", where);
  if ((status = read_listed(folder, where, name, MAX_MODEL_BYTES, bundle->manifest, model, message))) return status;
  if ((status = read_listed(folder, where, "probe.npz", MAX_PROBE_BYTES, bundle->manifest, known, message))) return status;
  if (!keep_fields(bundle)) return fail(message, CHEXNET_BUNDLE_ERROR, NO_MEMORY);
  if (strcmp(bundle->backend->file, name) != 0)
    return fail(message, CHEXNET_SESSION_ERROR, "%s holds %s, and this backend loads %s. Take another bundle or backend.", where, name,
                bundle->backend->file);
  return CHEXNET_OK;
}

/* Run pixels; refuse an answer that holds NaN or infinity, which would compare as absent with every operating point. */
static int run(chexnet *bundle, const uint8_t *pixels, char *message) {
  bool is_finite = true;
  if (bundle->backend->run(bundle->session, pixels, bundle->logits, bundle->maps, message)) return CHEXNET_SESSION_ERROR;
  for (size_t i = 0; i < n_values(&bundle->model, false); i++) is_finite = is_finite && isfinite(bundle->logits[i]);
  for (size_t i = 0; i < n_values(&bundle->model, true); i++) is_finite = is_finite && isfinite(bundle->maps[i]);
  if (!is_finite)
    return fail(message, CHEXNET_SESSION_ERROR, "the model answered with NaN or infinity. Don't use this bundle; build it again.");
  return CHEXNET_OK;
}

static int check_known_answers(chexnet *bundle, const probe *known, const char *where, char *message) {
  const size_t n = (size_t)bundle->model.n_findings, n_pixels = (size_t)bundle->model.side_px * (size_t)bundle->model.side_px;
  const size_t n_cells = n_values(&bundle->model, true) / n;
  /* Twice, because int8 rounds to another step when fp32 sums differ in the last bit. */
  double allowed = 2.0 * number(bundle->manifest, "probe_max_abs_logit_error", 0) + LOGIT_SLACK;
  for (size_t i = 0; i < N_STARTUP_PROBES; i++) {
    int status = run(bundle, known->pixels.data + i * n_pixels, message);
    if (status) return status;
    for (size_t c = 0; c < n; c++) {
      double logit = bundle->logits[c], error = fabsf(bundle->logits[c] - value_at(&known->logits, i * n + c)), mean = 0;
      if (!(error <= allowed))
        return fail(message, CHEXNET_SESSION_ERROR,
                    "%s: known answers differ by %.4f logits, %.4f is allowed. This backend does not run this model as it was proven; "
                    "don't use it here. Run: chexnet-deploy doctor",
                    where, error, allowed);
      for (size_t cell = 0; cell < n_cells; cell++) mean += bundle->maps[c * n_cells + cell];
      double gap = fabs(mean / (double)n_cells + bundle->head_bias[c] - logit) / fmax(1.0, fabs(logit));
      if (!(gap <= CAM_IDENTITY_TOLERANCE))
        return fail(message, CHEXNET_SESSION_ERROR, "%s: maps and logits disagree by %.1e, 1e-4 is allowed. Export it again.", where, gap);
    }
  }
  return CHEXNET_OK;
}

static int load(chexnet *bundle, content *model, const content *known, int threads, const char *where, char *message) {
  long cores = sysconf(_SC_NPROCESSORS_ONLN);
  probe answers;
  if (cores < 1) cores = 1;
  if (threads < 0 || threads > cores)
    return fail(message, CHEXNET_SESSION_ERROR, "got %d threads, needed 1 to %ld, the cores of this machine, or 0 for all.", threads, cores);
  int status = read_probe(*known, &bundle->model, where, &answers, message);
  if (!status) {
    uint8_t *bytes = model->bytes;
    model->bytes = NULL;
    threads = threads ? threads : (int)cores;
    status = bundle->backend->open(&bundle->model, bytes, model->size, threads, &bundle->session, message) ? CHEXNET_SESSION_ERROR : 0;
  }
  if (!status) status = check_known_answers(bundle, &answers, where, message);
  free_probe(&answers);
  return status;
}

int chexnet_open(const char *path, const chexnet_trust *trust, const chexnet_backend *backend, int threads, chexnet **out,
                 char *message) {
  content model = {0}, known = {0};
  *out = NULL;
  int folder = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0)
    return fail(message, CHEXNET_BUNDLE_ERROR, "%s is no bundle: %s; needed a directory that `export` wrote. Check the path.", path,
                strerror(errno));
  chexnet *bundle = calloc(1, sizeof *bundle);
  int status = bundle ? CHEXNET_OK : fail(message, CHEXNET_SESSION_ERROR, NO_MEMORY);
  if (bundle) bundle->backend = backend;
  if (!status) status = verify(bundle, folder, path, trust, &model, &known, message);
  close(folder);
  if (!status) status = load(bundle, &model, &known, threads, path, message);
  free(model.bytes);
  free(known.bytes);
  /* Once it has proven itself: a release that doesn't run must not lock out the one that does. */
  if (!status && trust && trust->floor_file)
    status = raise_floor(trust, (int32_t)field(given(bundle->manifest, "release"), "number")->number, message);
  if (status)
    chexnet_close(bundle);
  else
    *out = bundle;
  return status;
}

const chexnet_model *chexnet_get_model(const chexnet *bundle) { return &bundle->model; }

int chexnet_predict(chexnet *bundle, const uint8_t *gray, int height, int width, chexnet_prediction *prediction, char *message) {
  int status = check_picture(gray, height, width, message);
  if (!status) status = check_content(&bundle->policy, gray, height, width, message);
  if (!status) status = chexnet_resize(gray, height, width, bundle->model.side_px, bundle->pixels, message);
  if (!status) status = run(bundle, bundle->pixels, message);
  if (status) return status;
  for (int i = 0; i < bundle->model.n_findings; i++) {
    float logit = bundle->logits[i], small = expf(-fabsf(logit)); /* never overflows */
    double point = bundle->operating_points[i];
    bundle->probabilities[i] = logit >= 0 ? 1.0f / (1.0f + small) : small / (1.0f + small);
    bundle->present[i] = point < 0 ? -1 : bundle->probabilities[i] >= point;
  }
  *prediction = (chexnet_prediction){bundle->logits, bundle->probabilities, bundle->present, bundle->maps};
  return CHEXNET_OK;
}

void chexnet_close(chexnet *bundle) {
  if (!bundle) return;
  if (bundle->session) bundle->backend->close(bundle->session);
  free(bundle->manifest);
  free(bundle->raw.bytes);
  free(bundle->findings);
  free(bundle->operating_points);
  free(bundle->head_bias);
  free(bundle->pixels);
  free(bundle->logits);
  free(bundle->probabilities);
  free(bundle->maps);
  free(bundle->present);
  free(bundle);
}
