/* An inference engine that samples nothing: it says a script, and costs some ten microseconds a turn.
 *
 * It speaks what Verbatim asks of SGLang (`/generate` by token ids, streamed or whole) and OpenAI's
 * `/v1/chat/completions` (streamed or whole), on keep-alive connections of one epoll loop. Which reply of the script
 * it gives is told by the prompt alone: how often the ids that open a reply stand in it, or how many `"assistant"`
 * messages it has; the last reply repeats. Prompt tokens, log-probs, version spans and routing rows are as long as
 * they must be; their values mean nothing, but are the same wherever they are asked for (see `logprob_of`, `expert_of`).
 * It does not tokenise, knows no stop strings and no likeliest tokens, and pauses nothing.
 *
 * The script (benchmarks/load/script.py writes it), a line an entry:
 *   marker 822,477,198        ids that open a reply in a prompt
 *   reply                     begins one
 *   ids 12 13 904             its tokens
 *   finish {"type":"stop","matched":904}
 *   message {"role":"assistant",…}     for chats; @@@@@@@@ becomes a number of its own
 *   reason tool_calls                  finish_reason for chats
 *   delta {"role":"assistant",…}       for streamed chats, one an event
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "wire.h"

/* ---- settings ---- */

static int port;
static long tokens_per_event = 1;        /* where a request names no stream_interval */
static bool incremental, spread;
static double delay_from, delay_to;      /* seconds of a reply, drawn evenly */
static double seconds_per_max_token;     /* a reply lasts its limit of tokens times this, so who asks decides */
static long layers, top_k, num_experts;  /* of routing rows; layers 0: none */
static const char *model_info = "{\"model_path\":\"\",\"served_model_name\":\"fake\",\"weight_version\":\"default\"}";
static const char *server_info = "{}";
static const char *model_name = "fake";
static char *versions[64] = {"default"}; /* a reply is sampled by each in turn, for equal parts */
static long num_versions = 1;
static long context_length = 1000000;

/* ---- the script ---- */

typedef struct {
    long num_ids, num_deltas;
    Buffer ids, logprobs;             /* as JSON, without brackets */
    size_t *ids_end, *logprobs_end;   /* where the first n tokens end in it, n from 0 */
    char *finish, *message, *reason, **deltas;
} Reply;

static Reply *replies;
static long num_replies;
static Buffer marker; /* ",822,477,198" */

/* Of the n-th token of the turn-th reply. Python's float32 reads it alike. */
static double logprob_of(long turn, long n) { return -1e-6 * (double)((turn * 104729 + n * 7919) % 1000000); }

/* Of a place in the whole sequence, whichever turn asks: so rows of two turns can be compared. */
static int32_t expert_of(long position, long layer, long k) {
    uint64_t h = (uint64_t)position * 0x9E3779B97F4A7C15u + (uint64_t)layer * 0xC2B2AE3D27D4EB4Fu;
    h ^= h >> 29;
    return (int32_t)((h * 0xBF58476D1CE4E5B9u >> 33) % (uint64_t)num_experts + (uint64_t)k) % (int32_t)num_experts;
}

static void finish_reply(Reply *r, long turn, char *ids) {
    char *save = NULL;
    r->ids_end = calloc(1, sizeof(size_t));
    r->logprobs_end = calloc(1, sizeof(size_t));
    for (char *word = strtok_r(ids, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
        long n = r->num_ids++;
        append_format(&r->ids, n ? ",%s" : "%s", word);
        append_format(&r->logprobs, n ? ",[%.6f,%s,null]" : "[%.6f,%s,null]", logprob_of(turn, n), word);
        r->ids_end = realloc(r->ids_end, sizeof(size_t) * (size_t)(n + 2));
        r->logprobs_end = realloc(r->logprobs_end, sizeof(size_t) * (size_t)(n + 2));
        r->ids_end[n + 1] = r->ids.len;
        r->logprobs_end[n + 1] = r->logprobs.len;
    }
}

static void read_script(const char *file) {
    FILE *f = fopen(file, "r");
    char *line = NULL;
    size_t cap = 0;
    ssize_t len;
    if (f == NULL) die("engine: cannot read the script %s: %s", file, strerror(errno));
    while ((len = getline(&line, &cap, f)) > 0) {
        if (line[len - 1] == '\n') line[--len] = 0;
        char *value = strchr(line, ' ');
        if (value) *value++ = 0;
        Reply *r = num_replies ? &replies[num_replies - 1] : NULL;
        if (strcmp(line, "marker") == 0 && value) {
            append_format(&marker, ",%s", value);
        } else if (strcmp(line, "reply") == 0) {
            replies = realloc(replies, sizeof(Reply) * (size_t)(num_replies + 1));
            replies[num_replies++] = (Reply){.reason = "stop", .finish = "{\"type\":\"stop\"}", .message = "{}"};
        } else if (r == NULL || value == NULL) {
            die("engine: %s: a line that means nothing here: %s", file, line);
        } else if (strcmp(line, "ids") == 0) {
            finish_reply(r, num_replies, value);
        } else if (strcmp(line, "finish") == 0) {
            r->finish = strdup(value);
        } else if (strcmp(line, "message") == 0) {
            r->message = strdup(value);
        } else if (strcmp(line, "reason") == 0) {
            r->reason = strdup(value);
        } else if (strcmp(line, "delta") == 0) {
            r->deltas = realloc(r->deltas, sizeof(char *) * (size_t)(r->num_deltas + 1));
            r->deltas[r->num_deltas++] = strdup(value);
        } else {
            die("engine: %s: unknown entry: %s", file, line);
        }
    }
    free(line);
    fclose(f);
    if (num_replies == 0) die("engine: %s has no reply", file);
    for (long i = 0; i < num_replies; i++)
        if (replies[i].num_ids == 0) die("engine: %s: reply %ld has no ids", file, i + 1);
}

/* ---- connections ---- */

typedef struct Piece {
    struct Piece *next;
    const char *data;
    size_t len;
    char *owned; /* freed with the piece; NULL for what stays */
} Piece;

typedef struct {
    int fd;
    unsigned age;    /* grows when the descriptor is closed: timers of earlier owners are void */
    bool open, busy, wants_write, stream, chat, wants_experts;
    Message in;
    Piece *first, *last;
    const Reply *reply;
    long turn, limit, interval, sent_events, num_events, prompt_tokens, experts_start;
    long number; /* of a chat, for the ids of its calls */
    double began, duration;
    char rid[160];
} Conn;

static Conn *conns; /* by descriptor */
static int max_conns;
static int poller;

static struct {
    long requests, chats, in_flight, peak_in_flight, aborted, connections, peak_connections, bad, events;
} seen;

static void queue_piece(Conn *c, const char *data, size_t len, char *owned) {
    Piece *piece = malloc(sizeof *piece);
    *piece = (Piece){NULL, data, len, owned};
    if (c->last) c->last->next = piece;
    else c->first = piece;
    c->last = piece;
}

static void watch(Conn *c, bool write) {
    if (c->wants_write == write) return;
    c->wants_write = write;
    struct epoll_event e = {.events = EPOLLIN | (write ? EPOLLOUT : 0), .data.fd = c->fd};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e);
}

static void drop_pieces(Conn *c) {
    while (c->first) {
        Piece *piece = c->first;
        c->first = piece->next;
        free(piece->owned);
        free(piece);
    }
    c->last = NULL;
}

static void close_conn(Conn *c) {
    if (c->busy) {
        seen.in_flight--;
        seen.aborted++;
    }
    seen.connections--;
    close(c->fd);
    drop_pieces(c);
    release_message(&c->in);
    *c = (Conn){.fd = c->fd, .age = c->age + 1};
}

/* Send what is queued, as far as the socket takes it. */
static void flush_conn(Conn *c) {
    while (c->first) {
        struct iovec parts[64];
        int n = 0;
        for (Piece *p = c->first; p && n < 64; p = p->next) parts[n++] = (struct iovec){(void *)p->data, p->len};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)n};
        ssize_t sent = sendmsg(c->fd, &message, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EAGAIN) watch(c, true);
            else close_conn(c);
            return;
        }
        while (c->first && (size_t)sent >= c->first->len) {
            Piece *piece = c->first;
            sent -= (ssize_t)piece->len;
            c->first = piece->next;
            free(piece->owned);
            free(piece);
        }
        if (c->first == NULL) c->last = NULL;
        else c->first->data += sent, c->first->len -= (size_t)sent;
    }
    watch(c, false);
}

static void send_buffer(Conn *c, Buffer *b) { /* hands the buffer over */
    queue_piece(c, b->data, b->len, b->data);
    *b = (Buffer){0};
}

static void answer(Conn *c, int status, const char *body, size_t len) {
    Buffer out = {0};
    append_format(&out, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n", status,
                  status < 300 ? "OK" : "Refused", len);
    append(&out, body, len);
    send_buffer(c, &out);
}

static void answer_text(Conn *c, int status, const char *body) { answer(c, status, body, strlen(body)); }

/* ---- routing rows: base64 of int32 [rows, layers, top_k], from a pool that positions share ---- */

enum { POOL_ROWS = 6144 }; /* a multiple of 3, so that the pool's base64 has no padding */
static int32_t *pool;
static char *encoded_pool;

static size_t base64(char *to, const unsigned char *from, size_t len) {
    static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char *start = to;
    for (; len >= 3; from += 3, len -= 3) {
        unsigned v = (unsigned)from[0] << 16 | (unsigned)from[1] << 8 | from[2];
        *to++ = alphabet[v >> 18];
        *to++ = alphabet[v >> 12 & 63];
        *to++ = alphabet[v >> 6 & 63];
        *to++ = alphabet[v & 63];
    }
    if (len) {
        unsigned v = (unsigned)from[0] << 16 | (len > 1 ? (unsigned)from[1] << 8 : 0);
        *to++ = alphabet[v >> 18];
        *to++ = alphabet[v >> 12 & 63];
        *to++ = len > 1 ? alphabet[v >> 6 & 63] : '=';
        *to++ = '=';
    }
    return (size_t)(to - start);
}

static void fill_pool(void) {
    size_t row = (size_t)(layers * top_k);
    pool = malloc(POOL_ROWS * row * 4);
    encoded_pool = malloc(POOL_ROWS * row * 16 / 3 + 4);
    for (long p = 0; p < POOL_ROWS; p++)
        for (long l = 0; l < layers; l++)
            for (long k = 0; k < top_k; k++) pool[(size_t)p * row + (size_t)(l * top_k + k)] = expert_of(p, l, k);
    base64(encoded_pool, (unsigned char *)pool, POOL_ROWS * row * 4);
}

/* Queue the base64 of rows [start, stop); returns its length. Whole multiples of 3 rows need no copy. */
static void queue_rows(Conn *c, long start, long stop) {
    size_t row_bytes = (size_t)(layers * top_k * 4);
    if (row_bytes % 3 == 0 || start % 3 == 0) {
        long whole = row_bytes % 3 ? start + (stop - start) / 3 * 3 : stop;
        while (start < whole) {
            long from = start % POOL_ROWS, n = POOL_ROWS - from < whole - start ? POOL_ROWS - from : whole - start;
            queue_piece(c, encoded_pool + (size_t)from * row_bytes / 3 * 4, (size_t)n * row_bytes / 3 * 4, NULL);
            start += n;
        }
    }
    if (start == stop) return;
    Buffer rows = {0};
    for (; start < stop; start++) append(&rows, (char *)pool + (size_t)(start % POOL_ROWS) * row_bytes, row_bytes);
    char *text = malloc(rows.len * 4 / 3 + 8);
    queue_piece(c, text, base64(text, (unsigned char *)rows.data, rows.len), text);
    release(&rows);
}

static size_t rows_length(long start, long stop) {
    return ((size_t)(stop - start) * (size_t)(layers * top_k * 4) + 2) / 3 * 4;
}

/* ---- timers: a heap of when a connection has its next event ---- */

typedef struct {
    double due;
    int fd;
    unsigned age;
} Timer;

static Timer *timers;
static size_t num_timers, cap_timers;

static void add_timer(Timer t) {
    if (num_timers == cap_timers) timers = realloc(timers, sizeof(Timer) * (cap_timers = cap_timers * 2 + 64));
    size_t i = num_timers++;
    for (; i && timers[(i - 1) / 2].due > t.due; i = (i - 1) / 2) timers[i] = timers[(i - 1) / 2];
    timers[i] = t;
}

static Timer take_timer(void) {
    Timer top = timers[0], last = timers[--num_timers];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < num_timers) {
        if (child + 1 < num_timers && timers[child + 1].due < timers[child].due) child++;
        if (timers[child].due >= last.due) break;
        timers[i] = timers[child];
        i = child;
    }
    timers[i] = last;
    return top;
}

/* ---- replies ---- */

/* As SGLang: the first token at once, then as many as the interval says. */
static long tokens_after(const Conn *c, long events) {
    long n = events ? 1 + (events - 1) * c->interval : 0;
    return events >= c->num_events || n > c->limit ? c->limit : n;
}

static void append_spans(Buffer *b, long total, long stop) {
    append_text(b, ",\"weight_versions\":[");
    for (long v = 0; v < num_versions; v++) {
        long from = v * total / num_versions, to = (v + 1) * total / num_versions;
        if (to > stop) to = stop;
        if (from >= to) continue;
        append_format(b, from ? ",{\"version\":\"%s\",\"start\":%ld,\"end\":%ld}"
                              : "{\"version\":\"%s\",\"start\":%ld,\"end\":%ld}", versions[v], from, to);
    }
    append_text(b, "]");
}

/* One event of /generate, from the token that it begins with; `finish`: JSON, "null" but in the last. */
static void append_event(Buffer *b, const Conn *c, long from, long to, const char *finish) {
    const Reply *r = c->reply;
    if (!incremental) from = 0;
    append_text(b, "{\"text\":\"\",\"output_ids\":[");
    size_t skip = from > 0 && to > from; /* the comma */
    append(b, r->ids.data + r->ids_end[from] + skip, r->ids_end[to] - r->ids_end[from] - skip);
    append_format(b, "],\"meta_info\":{\"id\":\"%s\",\"finish_reason\":%s,\"prompt_tokens\":%ld,\"weight_version\":\"%s\"",
                  c->rid, finish, c->prompt_tokens, versions[num_versions - 1]);
    append_spans(b, c->limit, to);
    append_format(b, ",\"completion_tokens\":%ld,\"cached_tokens\":0,\"output_token_logprobs\":[", to);
    append(b, r->logprobs.data + r->logprobs_end[from] + skip, r->logprobs_end[to] - r->logprobs_end[from] - skip);
    append_text(b, "]");
}

static const char *finish_of(const Conn *c) {
    return c->limit < c->reply->num_ids ? "{\"type\":\"length\"}" : c->reply->finish;
}

static void end_reply(Conn *c) {
    c->busy = false;
    seen.in_flight--;
    next_message(&c->in);
}

/* The next event of a streamed /generate goes to `out`; routing rows need pieces of their own. */
static void generate_event(Conn *c, Buffer *out, const char *finish) {
    static Buffer event;
    long from = tokens_after(c, c->sent_events), to = tokens_after(c, c->sent_events + 1);
    bool last = finish != NULL;
    long rows_stop = c->prompt_tokens + to - 1;
    bool rows = last && c->wants_experts && rows_stop > c->experts_start;
    event.len = 0;
    append_event(&event, c, from, to, last ? finish : "null");
    append_text(&event, rows ? ",\"routed_experts\":\"" : "}}");
    const char *after = rows ? "\"}}" : "";
    size_t more = rows ? rows_length(c->experts_start, rows_stop) : 0;
    if (c->stream) {
        append_format(out, "%zx\r\ndata: ", 6 + event.len + more + strlen(after) + 2);
    } else {
        append_format(out, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n",
                      event.len + more + strlen(after));
    }
    append(out, event.data, event.len);
    if (rows) {
        send_buffer(c, out);
        queue_rows(c, c->experts_start, rows_stop);
        append_text(out, after);
    }
    if (c->stream) append_text(out, last ? "\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n" : "\n\n\r\n");
}

/* @@@@@@@@ of the script becomes a number, so that no two calls of tools share an id. */
static void append_numbered(Buffer *b, const char *text, long number) {
    for (const char *at; (at = strstr(text, "@@@@@@@@")) != NULL; text = at + 8) {
        append(b, text, (size_t)(at - text));
        append_format(b, "%08lx", number & 0xFFFFFFFF);
    }
    append_text(b, text);
}

static void append_chat_head(Buffer *b, const Conn *c, const char *object) {
    append_format(b, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%ld,\"model\":\"%s\",\"choices\":[{\"index\":0,", c->rid,
                  object, (long)time(NULL), model_name);
}

static void chat_whole(Conn *c, Buffer *out) {
    static Buffer body;
    body.len = 0;
    append_chat_head(&body, c, "chat.completion");
    append_text(&body, "\"message\":");
    append_numbered(&body, c->reply->message, c->number);
    append_format(&body,
                  ",\"logprobs\":null,\"finish_reason\":\"%s\"}],\"usage\":{\"prompt_tokens\":%ld,\"completion_tokens\":%ld,"
                  "\"total_tokens\":%ld}}",
                  c->reply->reason, c->prompt_tokens, c->limit, c->prompt_tokens + c->limit);
    append_format(out, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n", body.len);
    append(out, body.data, body.len);
}

static void chat_event(Conn *c, Buffer *out, bool last) {
    static Buffer event;
    event.len = 0;
    append_chat_head(&event, c, "chat.completion.chunk");
    append_text(&event, "\"delta\":");
    append_numbered(&event, last ? "{}" : c->reply->deltas[c->sent_events], c->number);
    if (last) append_format(&event, ",\"finish_reason\":\"%s\"}]}", c->reply->reason);
    else append_text(&event, ",\"finish_reason\":null}]}");
    append_format(out, "%zx\r\ndata: ", event.len + 8);
    append(out, event.data, event.len);
    append_text(out, last ? "\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n" : "\n\n\r\n");
}

/* How much of its time a reply has taken when so many events are due. */
static double share_after(const Conn *c, long events) {
    if (c->chat) return (double)events / (double)c->num_events;
    return (double)tokens_after(c, events) / (double)c->limit;
}

/* Say all that is due by now, and set the timer for what is not. */
static void say(Conn *c, double now) {
    Buffer out = {0};
    if (c->sent_events == 0 && c->stream)
        append_text(&out, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    for (;;) {
        long next = c->sent_events + 1;
        double due = c->began + c->duration * (spread ? share_after(c, next) : 1.0);
        if (c->duration > 0 && due > now) {
            add_timer((Timer){due, c->fd, c->age});
            break;
        }
        bool last = next == c->num_events;
        if (!c->chat) generate_event(c, &out, last ? finish_of(c) : NULL);
        else if (c->stream) chat_event(c, &out, last);
        else chat_whole(c, &out);
        c->sent_events = next;
        seen.events++;
        if (last) {
            end_reply(c);
            break;
        }
    }
    if (out.len && c->sent_events) send_buffer(c, &out);
    else release(&out);
    flush_conn(c);
}

/* End it where it is: SGLang's answer to an abort. */
static void abort_reply(Conn *c) {
    Buffer out = {0};
    if (c->chat) return;
    if (c->sent_events == 0 && c->stream)
        append_text(&out, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    c->num_events = c->sent_events + 1; /* nothing new: the last event repeats what was said */
    long said = tokens_after(c, c->sent_events);
    c->limit = said;
    generate_event(c, &out, "{\"type\":\"abort\",\"message\":\"Aborted\"}");
    seen.aborted++;
    end_reply(c);
    c->age++; /* its timer is void */
    send_buffer(c, &out);
    flush_conn(c);
}

/* ---- requests ---- */

static long count_ids(Slice ids) {
    long commas = 0;
    for (size_t i = 0; i < ids.len; i++) commas += ids.data[i] == ',';
    return ids.len > 2 ? commas + 1 : 0;
}

/* How often the marker stands in [1,2,3]. */
static long count_marker(Slice ids) {
    long count = 0;
    const char *stop = ids.data + ids.len;
    if (marker.len == 0) return 1;
    for (const char *p = ids.data; (p = memmem(p, (size_t)(stop - p), marker.data, marker.len)) != NULL;) {
        p += marker.len;
        count += !isdigit((unsigned char)*p);
    }
    return count;
}

static void without_spaces(Buffer *body, Slice *ids) {
    if (memchr(ids->data, ' ', ids->len) == NULL) return;
    char *to = body->data + (ids->data - body->data);
    size_t len = 0;
    for (size_t i = 0; i < ids->len; i++)
        if (!isspace((unsigned char)ids->data[i])) to[len++] = ids->data[i];
    ids->len = len;
}

static void begin_reply(Conn *c, long turn, long limit) {
    c->turn = turn < 1 ? 1 : turn > num_replies ? num_replies : turn;
    c->reply = &replies[c->turn - 1];
    double drawn = delay_from + (delay_to - delay_from) * (double)random() / (double)RAND_MAX;
    c->duration = seconds_per_max_token > 0 && limit > 0 ? seconds_per_max_token * (double)limit : drawn;
    c->limit = limit > 0 && limit < c->reply->num_ids ? limit : c->reply->num_ids;
    c->num_events = c->stream ? 1 + (c->limit - 1 + c->interval - 1) / c->interval : 1;
    if (c->chat && c->stream) c->num_events = c->reply->num_deltas + 1;
    c->sent_events = 0;
    c->began = now_seconds();
    c->busy = true;
    seen.requests++;
    if (++seen.in_flight > seen.peak_in_flight) seen.peak_in_flight = seen.in_flight;
    release(&c->in.body);
    say(c, c->began);
}

static bool is(Slice key, const char *name) { return key.len == strlen(name) && memcmp(key.data, name, key.len) == 0; }

static void set_rid(Conn *c, Slice rid) {
    size_t n = rid.len < sizeof c->rid - 1 ? rid.len : sizeof c->rid - 1;
    memcpy(c->rid, rid.data, n);
    c->rid[n] = 0;
}

static void generate(Conn *c) {
    const char *p = NULL;
    Slice key, value, ids = {0};
    long limit = 0;
    c->chat = c->stream = c->wants_experts = false;
    c->experts_start = 0;
    c->interval = tokens_per_event;
    snprintf(c->rid, sizeof c->rid, "r%ld", seen.requests);
    while (next_item(slice_of(&c->in.body), &p, &key, &value)) {
        if (is(key, "input_ids")) ids = value;
        else if (is(key, "rid")) set_rid(c, inside_quotes(value));
        else if (is(key, "stream")) c->stream = is_true(value);
        else if (is(key, "sampling_params")) {
            limit = number_of(member(value, "max_new_tokens"), 0);
            c->interval = number_of(member(value, "stream_interval"), tokens_per_event);
        }
        else if (is(key, "return_routed_experts")) c->wants_experts = is_true(value) && layers > 0;
        else if (is(key, "routed_experts_start_len")) c->experts_start = number_of(value, 0);
    }
    if (c->interval < 1) c->interval = tokens_per_event;
    if (ids.len < 3 || !isdigit((unsigned char)ids.data[1])) {
        seen.bad++;
        answer_text(c, 400, "{\"error\":{\"message\":\"this engine takes input_ids, one prompt a request\"}}");
        next_message(&c->in);
        flush_conn(c);
        return;
    }
    without_spaces(&c->in.body, &ids);
    c->prompt_tokens = count_ids(ids);
    begin_reply(c, count_marker(ids), limit);
}

static void chat(Conn *c) {
    const char *p = NULL;
    Slice key, value, messages = {0};
    long limit = 0;
    c->chat = true;
    c->stream = c->wants_experts = false;
    c->interval = 1;
    while (next_item(slice_of(&c->in.body), &p, &key, &value)) {
        if (is(key, "messages")) messages = value;
        else if (is(key, "stream")) c->stream = is_true(value);
        else if (is(key, "max_tokens") || is(key, "max_completion_tokens")) limit = number_of(value, limit);
    }
    if (messages.len < 2) {
        seen.bad++;
        answer_text(c, 400, "{\"error\":{\"message\":\"no messages\"}}");
        next_message(&c->in);
        flush_conn(c);
        return;
    }
    c->number = seen.chats++;
    snprintf(c->rid, sizeof c->rid, "chatcmpl-%ld", seen.chats);
    c->prompt_tokens = (long)(messages.len / 4) + 1;
    begin_reply(c, count_of(messages, (Slice){"\"assistant\"", 11}) + 1, limit);
}

static void abort_requests(Conn *asker) {
    Slice rid = inside_quotes(member(slice_of(&asker->in.body), "rid"));
    for (int fd = 0; fd < max_conns && rid.len; fd++) {
        Conn *c = &conns[fd];
        if (c->open && c->busy && strncmp(c->rid, rid.data, rid.len) == 0) abort_reply(c);
    }
    answer_text(asker, 200, "{\"success\":true}");
}

static void statistics(Conn *c) {
    char body[512];
    struct timespec cpu;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu);
    snprintf(body, sizeof body,
             "{\"requests\":%ld,\"chats\":%ld,\"in_flight\":%ld,\"peak_in_flight\":%ld,\"aborted\":%ld,\"connections\":%ld,"
             "\"peak_connections\":%ld,\"refused\":%ld,\"events\":%ld,\"cpu_seconds\":%.6f}",
             seen.requests, seen.chats, seen.in_flight, seen.peak_in_flight, seen.aborted, seen.connections,
             seen.peak_connections, seen.bad, seen.events, (double)cpu.tv_sec + 1e-9 * (double)cpu.tv_nsec);
    seen.peak_in_flight = seen.in_flight;
    seen.peak_connections = seen.connections;
    answer_text(c, 200, body);
}

static void models(Conn *c) {
    char body[512];
    snprintf(body, sizeof body, "{\"object\":\"list\",\"data\":[{\"id\":\"%s\",\"object\":\"model\",\"max_model_len\":%ld}]}",
             model_name, context_length);
    answer_text(c, 200, body);
}

static void serve_request(Conn *c) {
    const char *target = c->in.target;
    if (strcmp(target, "/generate") == 0) {
        generate(c);
        return;
    }
    if (strcmp(target, "/v1/chat/completions") == 0) {
        chat(c);
        return;
    }
    if (strcmp(target, "/model_info") == 0 || strcmp(target, "/get_model_info") == 0) answer_text(c, 200, model_info);
    else if (strcmp(target, "/server_info") == 0 || strcmp(target, "/get_server_info") == 0) answer_text(c, 200, server_info);
    else if (strcmp(target, "/v1/models") == 0) models(c);
    else if (strcmp(target, "/abort_request") == 0) abort_requests(c);
    else if (strcmp(target, "/statistics") == 0) statistics(c);
    else if (strcmp(target, "/ping") == 0 || strcmp(target, "/health") == 0 || strcmp(target, "/ready") == 0)
        answer_text(c, 200, "{}");
    else answer_text(c, 404, "{\"error\":{\"message\":\"not found\"}}");
    next_message(&c->in);
    flush_conn(c);
}

/* ---- the loop ---- */

static void receive(Conn *c) {
    static char piece[262144];
    unsigned age = c->age;
    while (c->open && c->age == age) {
        ssize_t n = recv(c->fd, piece, sizeof piece, 0);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) {
            close_conn(c);
            return;
        }
        if (c->busy) continue; /* nobody pipelines here */
        feed(&c->in, piece, (size_t)n);
        if (c->in.phase == BROKEN) {
            close_conn(c);
            return;
        }
        if (c->in.phase == WHOLE) serve_request(c);
        if (n < (ssize_t)sizeof piece) return;
    }
}

static void accept_all(int listener) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno != EAGAIN && errno != ECONNABORTED) fprintf(stderr, "engine: accept: %s\n", strerror(errno));
            return;
        }
        int one = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (fd >= max_conns) {
            int wanted = fd * 2 + 64;
            conns = realloc(conns, sizeof(Conn) * (size_t)wanted);
            memset(conns + max_conns, 0, sizeof(Conn) * (size_t)(wanted - max_conns));
            max_conns = wanted;
        }
        Conn *c = &conns[fd];
        *c = (Conn){.fd = fd, .age = c->age + 1, .open = true};
        struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e);
        if (++seen.connections > seen.peak_connections) seen.peak_connections = seen.connections;
    }
}

static int listening(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    socklen_t len = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0) die("engine: port %d: %s", port, strerror(errno));
    if (listen(fd, 65535) < 0) die("engine: listen: %s", strerror(errno));
    getsockname(fd, (struct sockaddr *)&address, &len);
    port = ntohs(address.sin_port);
    return fd;
}

static void serve(int listener) {
    struct epoll_event events[512], e = {.events = EPOLLIN, .data.fd = listener};
    poller = epoll_create1(EPOLL_CLOEXEC);
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &e);
    for (;;) {
        double wait = num_timers ? timers[0].due - now_seconds() : 3600;
        int n = wait_events(poller, events, 512, wait);
        for (int i = 0; i < n; i++) {
            if (events[i].data.fd == listener) {
                accept_all(listener);
                continue;
            }
            Conn *c = &conns[events[i].data.fd];
            if (c->open && events[i].events & EPOLLOUT) flush_conn(c);
            if (c->open && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(c);
        }
        double now = now_seconds();
        while (num_timers && timers[0].due <= now) {
            Timer t = take_timer();
            if (conns[t.fd].open && conns[t.fd].busy && conns[t.fd].age == t.age) say(&conns[t.fd], now);
        }
    }
}

static void add_versions(char *labels) {
    char *save = NULL;
    num_versions = 0;
    for (char *v = strtok_r(labels, ",", &save); v && num_versions < 64; v = strtok_r(NULL, ",", &save))
        versions[num_versions++] = v;
    if (num_versions == 0) die("engine: --weight-versions names none");
}

int main(int argc, char **argv) {
    static const struct option options[] = {
        {"port", 1, 0, 'p'},          {"script", 1, 0, 's'},        {"tokens-per-event", 1, 0, 't'},
        {"incremental", 0, 0, 'i'},   {"delay-ms", 1, 0, 'd'},      {"spread", 0, 0, 'S'},
        {"ms-per-max-token", 1, 0, 'M'}, {"experts", 1, 0, 'e'},    {"model-info", 1, 0, 'm'},
        {"server-info", 1, 0, 'I'},   {"model-name", 1, 0, 'n'},    {"weight-versions", 1, 0, 'w'},
        {"context-length", 1, 0, 'c'}, {0, 0, 0, 0},
    };
    const char *script = NULL;
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (o) {
        case 'p': port = atoi(optarg); break;
        case 's': script = optarg; break;
        case 't': tokens_per_event = atol(optarg); break;
        case 'i': incremental = true; break;
        case 'S': spread = true; break;
        case 'd': {
            char *to = strchr(optarg, '-');
            delay_from = 1e-3 * atof(optarg);
            delay_to = to ? 1e-3 * atof(to + 1) : delay_from;
            break;
        }
        case 'M': seconds_per_max_token = 1e-3 * atof(optarg); break;
        case 'e':
            if (sscanf(optarg, "%ld,%ld,%ld", &layers, &top_k, &num_experts) != 3)
                die("engine: --experts LAYERS,TOP_K,EXPERTS, not %s", optarg);
            break;
        case 'm': model_info = optarg; break;
        case 'I': server_info = optarg; break;
        case 'n': model_name = optarg; break;
        case 'w': add_versions(optarg); break;
        case 'c': context_length = atol(optarg); break;
        default: return 2;
        }
    }
    if (script == NULL || tokens_per_event < 1) die("engine: --script FILE is needed, --tokens-per-event is at least 1");
    signal(SIGPIPE, SIG_IGN);
    read_script(script);
    if (layers) fill_pool();
    int listener = listening();
    printf("ready %d\n", port);
    fflush(stdout);
    serve(listener);
}
