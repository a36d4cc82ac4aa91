/* What engine.c and generator.c share: growing buffers, reading HTTP/1.1 messages, walking over JSON text.
 *
 * Only what a benchmark on loopback needs: no pipelining, no trailers that mean something, no obsolete line folding. */

#ifndef WIRE_H
#define WIRE_H

#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <time.h>

static inline double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(2);
}

/* Wait for events; to the microsecond where the kernel can (5.11), else to the millisecond above. */
static inline int wait_events(int poller, struct epoll_event *events, int most, double wait_seconds) {
    static bool coarse;
    double wait = wait_seconds < 0 ? 0 : wait_seconds > 3600 ? 3600 : wait_seconds;
    if (!coarse) {
        struct timespec t = {(time_t)wait, (long)(1e9 * (wait - (double)(time_t)wait))};
        int n = epoll_pwait2(poller, events, most, &t, NULL);
        if (n >= 0 || errno != ENOSYS) return n;
        coarse = true;
    }
    return epoll_wait(poller, events, most, wait <= 0 ? 0 : (int)(wait * 1000) + 1);
}

/* ---- bytes that grow ---- */

typedef struct {
    char *data;
    size_t len, cap;
} Buffer;

static inline void reserve(Buffer *b, size_t more) {
    if (b->len + more <= b->cap) return;
    size_t cap = b->cap ? b->cap : 512;
    while (cap < b->len + more) cap += cap / 2;
    b->data = realloc(b->data, cap);
    if (b->data == NULL) die("out of memory");
    b->cap = cap;
}

static inline void append(Buffer *b, const void *data, size_t len) {
    if (len == 0) return;
    reserve(b, len);
    memcpy(b->data + b->len, data, len);
    b->len += len;
}

static inline void append_text(Buffer *b, const char *text) { append(b, text, strlen(text)); }

static inline void append_format(Buffer *b, const char *format, ...) {
    va_list arguments;
    reserve(b, 256);
    va_start(arguments, format);
    int len = vsnprintf(b->data + b->len, b->cap - b->len, format, arguments);
    va_end(arguments);
    if ((size_t)len >= b->cap - b->len) {
        reserve(b, (size_t)len + 1);
        va_start(arguments, format);
        vsnprintf(b->data + b->len, b->cap - b->len, format, arguments);
        va_end(arguments);
    }
    b->len += (size_t)len;
}

static inline void release(Buffer *b) {
    free(b->data);
    *b = (Buffer){0};
}

/* Empty it; what a long message left behind goes back, so that thousands of connections stay small. */
static inline void clear(Buffer *b) {
    if (b->cap > 65536) release(b);
    b->len = 0;
}

/* ---- a piece of text that somebody else owns ---- */

typedef struct {
    const char *data;
    size_t len;
} Slice;

static inline Slice slice_of(const Buffer *b) { return (Slice){b->data, b->len}; }

static inline const char *find(Slice in, const char *what) {
    return in.len ? memmem(in.data, in.len, what, strlen(what)) : NULL;
}

static inline long count_of(Slice in, Slice what) {
    long count = 0;
    const char *stop = in.data + in.len;
    if (what.len == 0) return 0;
    for (const char *p = in.data; p != NULL && p < stop; count++, p += what.len) {
        p = memmem(p, (size_t)(stop - p), what.data, what.len);
        if (p == NULL) break;
    }
    return count;
}

/* ---- HTTP/1.1, one message at a time, fed with pieces cut anywhere (RFC 9112) ---- */

enum phase { HEAD, LENGTH, UNTIL_CLOSE, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER, WHOLE, BROKEN };

typedef struct {
    enum phase phase;
    Buffer head; /* first line and headers, later the line of a chunk's size */
    Buffer body; /* what of the body has come, without its framing */
    size_t left; /* bytes that the body or the chunk still lacks */
    int status;  /* of an answer; 0 of a request */
    bool closes; /* the connection ends after this message */
    char target[1024]; /* of a request */
    bool is_post;
} Message;

static inline void next_message(Message *m) {
    clear(&m->head);
    clear(&m->body);
    m->phase = HEAD;
    m->status = 0;
    m->closes = false;
    m->left = 0;
}

static inline void release_message(Message *m) {
    release(&m->head);
    release(&m->body);
}

/* The value of a header in a head that ends with an empty line; NULL where there is none. */
static inline const char *header(const Buffer *head, const char *name) {
    size_t len = strlen(name);
    const char *p = head->data, *stop = head->data + head->len;
    while ((p = memchr(p, '\n', (size_t)(stop - p))) != NULL) {
        p++;
        if ((size_t)(stop - p) > len && p[len] == ':' && strncasecmp(p, name, len) == 0) {
            for (p += len + 1; *p == ' ' || *p == '\t'; p++) {}
            return p;
        }
    }
    return NULL;
}

static inline void read_head(Message *m) {
    append(&m->head, "", 1);
    m->head.len--;
    if (strncmp(m->head.data, "HTTP/1.", 7) == 0) {
        m->status = atoi(m->head.data + 9);
    } else {
        m->is_post = strncmp(m->head.data, "POST ", 5) == 0;
        const char *from = strchr(m->head.data, ' '), *to = from ? strpbrk(from + 1, " ?\r") : NULL;
        if (to == NULL || to - from > (long)sizeof m->target) {
            m->phase = BROKEN;
            return;
        }
        memcpy(m->target, from + 1, (size_t)(to - from - 1));
        m->target[to - from - 1] = 0;
    }
    const char *connection = header(&m->head, "connection");
    m->closes = connection != NULL && strncasecmp(connection, "close", 5) == 0;
    const char *encoding = header(&m->head, "transfer-encoding"), *length = header(&m->head, "content-length");
    if (encoding != NULL && strncasecmp(encoding, "chunked", 7) == 0) {
        m->phase = CHUNK_SIZE;
        m->head.len = 0;
    } else if (length != NULL) {
        m->left = strtoull(length, NULL, 10);
        m->phase = m->left ? LENGTH : WHOLE;
        reserve(&m->body, m->left);
    } else {
        m->phase = m->status ? UNTIL_CLOSE : WHOLE;
    }
}

/* Take a line up to its LF into `head`; true when it is whole. */
static inline bool take_line(Message *m, const char **p, const char *stop) {
    const char *end = memchr(*p, '\n', (size_t)(stop - *p));
    append(&m->head, *p, (size_t)((end ? end + 1 : stop) - *p));
    *p = end ? end + 1 : stop;
    return end != NULL;
}

static inline bool is_head_whole(const Buffer *head) {
    return head->len >= 4 && memcmp(head->data + head->len - 4, "\r\n\r\n", 4) == 0;
}

/* Read on; returns how many bytes belonged to this message. Look at `phase` afterwards. */
static inline size_t feed(Message *m, const char *data, size_t len) {
    const char *p = data, *stop = data + len;
    while (p < stop && m->phase != WHOLE && m->phase != BROKEN) {
        size_t n = (size_t)(stop - p);
        switch (m->phase) {
        case HEAD:
            while (p < stop && m->phase == HEAD)
                if (take_line(m, &p, stop) && is_head_whole(&m->head)) read_head(m);
            break;
        case LENGTH:
        case CHUNK:
            n = n < m->left ? n : m->left;
            append(&m->body, p, n);
            p += n;
            m->left -= n;
            if (m->left == 0) m->phase = m->phase == LENGTH ? WHOLE : CHUNK_END;
            break;
        case UNTIL_CLOSE:
            append(&m->body, p, n);
            p = stop;
            break;
        case CHUNK_SIZE:
            if (!take_line(m, &p, stop)) break;
            append(&m->head, "", 1);
            if (!isxdigit((unsigned char)m->head.data[0])) m->phase = BROKEN;
            else m->phase = (m->left = strtoull(m->head.data, NULL, 16)) ? CHUNK : TRAILER;
            m->head.len = 0;
            break;
        case CHUNK_END:
            if (!take_line(m, &p, stop)) break;
            m->head.len = 0;
            m->phase = CHUNK_SIZE;
            break;
        case TRAILER:
            if (!take_line(m, &p, stop)) break;
            if (m->head.len <= 2) m->phase = WHOLE;
            m->head.len = 0;
            break;
        default: break;
        }
    }
    return (size_t)(p - data);
}

/* ---- JSON text, as far as fields have to be found in it (RFC 8259) ---- */

static inline const char *skip_space(const char *p, const char *stop) {
    while (p < stop && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t')) p++;
    return p;
}

/* Behind the string that begins at p; NULL if it does not end. */
static inline const char *string_end(const char *p, const char *stop) {
    for (p++; p < stop; p++) {
        const char *quote = memchr(p, '"', (size_t)(stop - p));
        if (quote == NULL) return NULL;
        const char *escapes = quote;
        while (escapes > p && escapes[-1] == '\\') escapes--;
        p = quote;
        if ((quote - escapes) % 2 == 0) return quote + 1;
    }
    return NULL;
}

/* Behind an array of numbers alone, which a prompt of 100,000 ids is; NULL for any other value. */
static inline const char *numbers_end(const char *p, const char *stop) {
    if (stop - p < 2 || p[0] != '[' || !isdigit((unsigned char)p[1])) return NULL;
    const char *end = memchr(p, ']', (size_t)(stop - p));
    if (end == NULL) return NULL;
    size_t len = (size_t)(end - p - 1);
    return memchr(p + 1, '[', len) || memchr(p, '"', len) || memchr(p, '{', len) ? NULL : end + 1;
}

/* Behind the value that begins at p; NULL if it does not end. */
static inline const char *value_end(const char *p, const char *stop) {
    int depth = 0;
    const char *numbers = numbers_end(p, stop);
    if (numbers != NULL) return numbers;
    while (p < stop) {
        switch (*p) {
        case '"':
            p = string_end(p, stop);
            if (p == NULL || depth == 0) return p;
            continue;
        case '{':
        case '[': depth++; break;
        case '}':
        case ']':
            if (depth == 0) return p;
            if (--depth == 0) return p + 1;
            break;
        case ',':
            if (depth == 0) return p;
            break;
        default: break;
        }
        p++;
    }
    return depth == 0 ? stop : NULL;
}

/* The next element of an array, or the next key and value of an object; false at its end. *p starts at 0. */
static inline bool next_item(Slice all, const char **p, Slice *key, Slice *value) {
    const char *stop = all.data + all.len;
    if (all.len < 2) return false;
    bool object = all.data[0] == '{';
    *p = skip_space(*p ? *p : all.data + 1, stop);
    if (*p < stop && **p == ',') *p = skip_space(*p + 1, stop);
    if (*p >= stop || **p == '}' || **p == ']') return false;
    if (object) {
        const char *end = **p == '"' ? string_end(*p, stop) : NULL;
        if (end == NULL) return false;
        *key = (Slice){*p + 1, (size_t)(end - *p - 2)};
        end = skip_space(end, stop);
        if (end >= stop || *end != ':') return false;
        *p = skip_space(end + 1, stop);
    }
    const char *end = value_end(*p, stop);
    if (end == NULL) return false;
    *value = (Slice){*p, (size_t)(end - *p)};
    while (value->len && isspace((unsigned char)value->data[value->len - 1])) value->len--;
    *p = end;
    return true;
}

/* The value of a key of an object, of length 0 where there is none. */
static inline Slice member(Slice object, const char *name) {
    const char *p = NULL;
    Slice key, value;
    size_t len = strlen(name);
    if (object.len == 0 || object.data[0] != '{') return (Slice){0};
    while (next_item(object, &p, &key, &value))
        if (key.len == len && memcmp(key.data, name, len) == 0) return value;
    return (Slice){0};
}

static inline Slice first_element(Slice array) {
    const char *p = NULL;
    Slice key, value;
    return array.len && array.data[0] == '[' && next_item(array, &p, &key, &value) ? value : (Slice){0};
}

/* What stands between the quotes of a string; of length 0 for anything else. */
static inline Slice inside_quotes(Slice string) {
    return string.len >= 2 && string.data[0] == '"' ? (Slice){string.data + 1, string.len - 2} : (Slice){0};
}

static inline long number_of(Slice value, long otherwise) {
    return value.len && (isdigit((unsigned char)value.data[0]) || value.data[0] == '-') ? strtol(value.data, NULL, 10)
                                                                                       : otherwise;
}

static inline bool is_true(Slice value) { return value.len == 4 && memcmp(value.data, "true", 4) == 0; }

#endif
