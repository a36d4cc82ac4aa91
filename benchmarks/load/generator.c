/* Agents that cost little: N conversations with tools at once, each turn the history so far plus one tool's result.
 *
 * A reply's own message goes back as it came, byte for byte; of a streamed reply it is put together as the SDKs do.
 * One epoll loop, one keep-alive connection a session. Closed loop (a session asks again as soon as it was answered)
 * or open loop (`--rate` conversations a second, whose first latency counts from when they should have begun).
 *
 * The conversation (benchmarks/load/script.py writes it), a line an entry, all of it JSON text:
 *   head {"model":"m","messages":[
 *   messages {"role":"system",…},{"role":"user",…}    @@@@@@@@ becomes the conversation's number
 *   tail ],"tools":[…],"temperature":1.0              what follows the messages, but the last brace
 *   result …                                          what a tool says, or the user where no tool was called; in turn
 *
 * Each turn is a record of `--records FILE`: seconds since the start, latency, time to the first byte of the reply
 * (float64), turn, status (int32; 200, another status, or 0: broken off, -1: not the reply that was due), tokens asked
 * for at most (int32), 0. What went wrong first goes to stderr. The last line of stdout is the account, as JSON. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "wire.h"

/* ---- settings ---- */

static const char *host = "127.0.0.1", *path = "/sessions/{id}/v1/chat/completions", *name = "s", *key_header;
static int port;
static long num_sessions = 1, num_conversations, num_turns = 10, wait_after, wait_every, max_tokens_from, max_tokens_to;
static double seconds, rate, ramp_seconds;
static bool streamed, tools, session_header;
static const char *dump; /* file for the last body of the first session */
static Buffer head, first_messages, tail;
static char **results;
static long num_results;

/* ---- sessions ---- */

enum { MAX_CALLS = 8 };

typedef struct {
    int fd; /* -1: not connected */
    bool active, wants_write;
    long conversation, turn;
    double due, asked, heard;
    int max_tokens;
    Message in;
    Buffer messages, out;
    size_t sent;
} Session;

typedef struct {
    double start, latency, first_byte;
    int32_t turn, status, max_tokens, unused;
} Record;

static Session *sessions;
static int poller;
static FILE *records;
static double began, stops_at = INFINITY;
static long started, finished, abandoned, active, paused, turns_done, errors, explained;
static size_t bytes_out, bytes_in;
static struct sockaddr_in address;

static void read_conversation(const char *file) {
    FILE *f = fopen(file, "r");
    char *line = NULL;
    size_t cap = 0;
    ssize_t len;
    if (f == NULL) die("generator: cannot read the conversation %s: %s", file, strerror(errno));
    while ((len = getline(&line, &cap, f)) > 0) {
        if (line[len - 1] == '\n') line[--len] = 0;
        char *value = strchr(line, ' ');
        if (value == NULL) die("generator: %s: a line that means nothing: %s", file, line);
        *value++ = 0;
        if (strcmp(line, "head") == 0) append_text(&head, value);
        else if (strcmp(line, "messages") == 0) append_text(&first_messages, value);
        else if (strcmp(line, "tail") == 0) append_text(&tail, value);
        else if (strcmp(line, "result") == 0) {
            results = realloc(results, sizeof(char *) * (size_t)(num_results + 1));
            results[num_results++] = strdup(value);
        } else die("generator: %s: unknown entry: %s", file, line);
    }
    free(line);
    fclose(f);
    if (head.len == 0 || first_messages.len == 0 || tail.len == 0 || num_results == 0)
        die("generator: %s needs head, messages, tail and a result", file);
    append(&first_messages, "", 1);
}

static void append_numbered(Buffer *b, const char *text, long number) {
    for (const char *at; (at = strstr(text, "@@@@@@@@")) != NULL; text = at + 8) {
        append(b, text, (size_t)(at - text));
        append_format(b, "%08ld", number);
    }
    append_text(b, text);
}

static void explain(const Session *s, const char *what) {
    if (explained++ >= 3) return;
    int shown = s->in.body.len < 600 ? (int)s->in.body.len : 600;
    fprintf(stderr, "generator: conversation %s-%ld, turn %ld: %s%s%.*s\n", name, s->conversation, s->turn, what,
            shown ? ": " : "", shown, shown ? s->in.body.data : "");
}

/* ---- sending ---- */

static void watch(Session *s, bool write) {
    if (s->wants_write == write) return;
    s->wants_write = write;
    struct epoll_event e = {.events = EPOLLIN | (write ? EPOLLOUT : 0), .data.ptr = s};
    epoll_ctl(poller, EPOLL_CTL_MOD, s->fd, &e);
}

static void connect_session(Session *s) {
    int one = 1;
    s->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (s->fd < 0) die("generator: socket: %s", strerror(errno));
    setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(s->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS)
        die("generator: connect: %s", strerror(errno));
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.ptr = s};
    s->wants_write = true;
    epoll_ctl(poller, EPOLL_CTL_ADD, s->fd, &e);
}

static void disconnect(Session *s) {
    if (s->fd >= 0) close(s->fd);
    s->fd = -1;
    s->wants_write = false;
}

static void end_turn(Session *s, int status);

static void flush_session(Session *s) {
    while (s->sent < s->out.len) {
        ssize_t n = send(s->fd, s->out.data + s->sent, s->out.len - s->sent, MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == ENOTCONN)) {
            watch(s, true);
            return;
        }
        if (n < 0) {
            end_turn(s, 0);
            return;
        }
        s->sent += (size_t)n;
    }
    clear(&s->out);
    watch(s, false);
}

static void append_target(Buffer *b, const Session *s) {
    const char *place = strstr(path, "{id}");
    if (place == NULL) append_text(b, path);
    else append_format(b, "%.*s%s-%ld%s", (int)(place - path), path, name, s->conversation, place + 4);
}

static void dump_body(const Session *s, size_t body_at) {
    FILE *f = fopen(dump, "w");
    if (f == NULL) die("generator: cannot write %s: %s", dump, strerror(errno));
    fwrite(s->out.data + body_at, 1, s->out.len - body_at, f);
    fclose(f);
}

/* Send the history; its latency counts from `due`. */
static void ask(Session *s, double due) {
    char last[96];
    s->max_tokens = (int)(max_tokens_from + (max_tokens_to > max_tokens_from
                                                 ? random() % (max_tokens_to - max_tokens_from + 1) : 0));
    int n = s->max_tokens ? snprintf(last, sizeof last, ",\"max_tokens\":%d}", s->max_tokens)
                          : snprintf(last, sizeof last, "}");
    s->out.len = s->sent = 0;
    append_text(&s->out, "POST ");
    append_target(&s->out, s);
    append_format(&s->out, " HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n", host,
                  port, head.len + s->messages.len + tail.len + (size_t)n);
    if (session_header) append_format(&s->out, "X-Session-ID: %s-%ld\r\n", name, s->conversation);
    if (key_header) append_format(&s->out, "%s\r\n", key_header);
    append_text(&s->out, "\r\n");
    size_t body_at = s->out.len;
    append(&s->out, head.data, head.len);
    append(&s->out, s->messages.data, s->messages.len);
    append(&s->out, tail.data, tail.len);
    append(&s->out, last, (size_t)n);
    if (dump && s == sessions) dump_body(s, body_at);
    bytes_out += s->out.len;
    next_message(&s->in);
    s->due = due;
    s->asked = now_seconds();
    s->heard = 0;
    if (s->fd < 0) connect_session(s);
    else flush_session(s);
}

/* ---- replies ---- */

typedef struct {
    Slice id, name;
    Buffer arguments;
} Call;

/* Put a streamed message together: raw pieces of JSON strings may be joined as they are. */
static bool assemble(Slice stream, Buffer *message, long *num_calls, Slice *call_ids) {
    static Buffer content, reasoning;
    static Call calls[MAX_CALLS];
    bool ended = false, done = false;
    long n = 0;
    content.len = reasoning.len = 0;
    for (const char *p = stream.data, *stop = p + stream.len; p < stop;) {
        const char *end = memchr(p, '\n', (size_t)(stop - p));
        if (end == NULL) break;
        Slice line = {p, (size_t)(end - p)};
        p = end + 1;
        if (line.len < 6 || memcmp(line.data, "data: ", 6) != 0) continue;
        Slice event = {line.data + 6, line.len - 6};
        if (event.len >= 6 && memcmp(event.data, "[DONE]", 6) == 0) {
            done = true;
            continue;
        }
        Slice choice = first_element(member(event, "choices")), delta = member(choice, "delta");
        Slice finish = member(choice, "finish_reason");
        ended = ended || (finish.len && finish.data[0] == '"');
        Slice text = inside_quotes(member(delta, "content"));
        append(&content, text.data, text.len);
        text = inside_quotes(member(delta, "reasoning_content"));
        append(&reasoning, text.data, text.len);
        const char *at = NULL;
        Slice key, piece, pieces = member(delta, "tool_calls");
        while (pieces.len && pieces.data[0] == '[' && next_item(pieces, &at, &key, &piece)) {
            long i = number_of(member(piece, "index"), 0);
            if (i < 0 || i >= MAX_CALLS || i > n) return false;
            if (i == n) {
                Buffer kept = calls[n].arguments;
                kept.len = 0;
                calls[n++] = (Call){.arguments = kept};
            }
            Slice function = member(piece, "function"), id = inside_quotes(member(piece, "id"));
            Slice called = inside_quotes(member(function, "name"));
            if (id.len) calls[i].id = id;
            if (called.len) calls[i].name = called;
            Slice arguments = inside_quotes(member(function, "arguments"));
            append(&calls[i].arguments, arguments.data, arguments.len);
        }
    }
    append_text(message, "{\"role\":\"assistant\",\"content\":");
    if (content.len || n == 0) append_format(message, "\"%.*s\"", (int)content.len, content.len ? content.data : "");
    else append_text(message, "null");
    if (reasoning.len) append_format(message, ",\"reasoning_content\":\"%.*s\"", (int)reasoning.len, reasoning.data);
    for (long i = 0; i < n; i++) {
        append_text(message, i ? "," : ",\"tool_calls\":[");
        append_format(message, "{\"id\":\"%.*s\",\"type\":\"function\",\"function\":{\"name\":\"%.*s\",\"arguments\":\"%.*s\"}}",
                      (int)calls[i].id.len, calls[i].id.data, (int)calls[i].name.len, calls[i].name.data,
                      (int)calls[i].arguments.len, calls[i].arguments.len ? calls[i].arguments.data : "");
        call_ids[i] = calls[i].id;
    }
    if (n) append_text(message, "]");
    append_text(message, "}");
    *num_calls = n;
    return ended && done;
}

/* Append the reply's message as it came; false if there is none. */
static bool take_whole(Slice body, Buffer *messages, long *num_calls, Slice *call_ids) {
    Slice message = member(first_element(member(body, "choices")), "message"), key, call;
    Slice calls = member(message, "tool_calls");
    const char *at = NULL;
    *num_calls = 0;
    if (message.len == 0) return false;
    append(messages, message.data, message.len);
    while (calls.len && calls.data[0] == '[' && *num_calls < MAX_CALLS && next_item(calls, &at, &key, &call))
        call_ids[(*num_calls)++] = inside_quotes(member(call, "id"));
    return true;
}

/* The history grows by what was said and by what the tools answer; false if the reply is not what was due. */
static bool take_reply(Session *s) {
    Slice call_ids[MAX_CALLS];
    long num_calls = 0;
    append_text(&s->messages, ",");
    bool taken = streamed ? assemble(slice_of(&s->in.body), &s->messages, &num_calls, call_ids)
                          : take_whole(slice_of(&s->in.body), &s->messages, &num_calls, call_ids);
    if (!taken || (num_calls > 0) != (tools && s->turn < num_turns)) return false;
    const char *result = results[(s->turn - 1) % num_results];
    for (long i = 0; i < num_calls; i++) {
        append_format(&s->messages, ",{\"role\":\"tool\",\"tool_call_id\":\"%.*s\",\"content\":\"", (int)call_ids[i].len,
                      call_ids[i].data);
        append_numbered(&s->messages, result, s->conversation * 1000 + s->turn);
        append_text(&s->messages, "\"}");
    }
    if (num_calls == 0) {
        append_text(&s->messages, ",{\"role\":\"user\",\"content\":\"");
        append_numbered(&s->messages, result, s->conversation * 1000 + s->turn);
        append_text(&s->messages, "\"}");
    }
    return true;
}

/* ---- the course of a conversation ---- */

static bool may_begin(double now) { return (num_conversations == 0 || started < num_conversations) && now < stops_at; }

static void begin_conversation(Session *s, double due) {
    s->conversation = started++;
    s->turn = 1;
    s->active = true;
    active++;
    clear(&s->messages);
    append_numbered(&s->messages, first_messages.data, s->conversation);
    ask(s, due);
}

static void end_conversation(Session *s) {
    s->active = false;
    active--;
}

/* Once all conversations stand behind turn `--wait-after`, or a multiple of `--wait-every`, whoever started this says
 * when they go on: a line on stdin. */
static void maybe_resume(void) {
    char line[16];
    if (paused < active || started < num_conversations) return;
    printf("waiting\n");
    fflush(stdout);
    if (fgets(line, sizeof line, stdin) == NULL) die("generator: nobody said to go on");
    paused = 0;
    double now = now_seconds();
    for (long i = 0; i < num_sessions; i++)
        if (sessions[i].active) ask(&sessions[i], now);
}

static void next_turn(Session *s, double now) {
    s->turn++;
    if (now >= stops_at) {
        abandoned++;
        end_conversation(s);
    } else if ((wait_after && s->turn == wait_after + 1) || (wait_every && (s->turn - 1) % wait_every == 0)) {
        paused++;
        maybe_resume();
    } else {
        ask(s, now);
    }
}

static void note(const Session *s, double now, int status) {
    Record r = {s->due - began, now - s->due, s->heard ? s->heard - s->due : 0, (int32_t)s->turn, status, s->max_tokens, 0};
    turns_done++;
    if (records) fwrite(&r, sizeof r, 1, records);
}

/* The turn is over: answered (200), refused, or broken (0). A conversation that failed is not gone on with. */
static void end_turn(Session *s, int status) {
    double now = now_seconds();
    if (status == 200 && !take_reply(s)) {
        explain(s, "not the reply that was due");
        status = -1;
    } else if (status != 200) {
        char what[64];
        snprintf(what, sizeof what, status ? "HTTP %d" : "the connection broke", status);
        explain(s, what);
    }
    note(s, now, status);
    if (status != 200) errors++;
    if (status == 0 || s->in.closes) disconnect(s);
    if (status == 200 && s->turn < num_turns) {
        next_turn(s, now);
        return;
    }
    if (status == 200) finished++;
    else abandoned++;
    end_conversation(s);
    if (rate == 0 && may_begin(now)) begin_conversation(s, now);
    else if (paused) maybe_resume();
}

static void receive(Session *s) {
    static char piece[262144];
    ssize_t n = recv(s->fd, piece, sizeof piece, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        if (!s->active || s->out.len == 0) { /* between two turns: the next one connects again */
            bool under_way = s->active && s->in.phase != WHOLE;
            if (under_way && s->in.phase == UNTIL_CLOSE) {
                s->in.closes = true;
                end_turn(s, s->in.status);
            } else if (under_way) end_turn(s, 0);
            else disconnect(s);
        } else end_turn(s, 0);
        return;
    }
    bytes_in += (size_t)n;
    if (!s->active) return;
    if (s->heard == 0) s->heard = now_seconds();
    feed(&s->in, piece, (size_t)n);
    if (s->in.phase == BROKEN) end_turn(s, 0);
    else if (s->in.phase == WHOLE) end_turn(s, s->in.status);
}

/* ---- the loop ---- */

/* Open loop: conversations come as a Poisson process. Ramp: the sessions begin one after another. */
static double next_arrival(double previous) {
    if (rate > 0) return previous - log(1.0 - (double)random() / ((double)RAND_MAX + 1.0)) / rate;
    return previous + ramp_seconds / (double)num_sessions;
}

static Session *next_session(void) {
    static long last = -1;
    if (rate == 0) return ++last < num_sessions ? &sessions[last] : NULL;
    for (long i = 0; i < num_sessions; i++) {
        last = (last + 1) % num_sessions;
        if (!sessions[last].active) return &sessions[last];
    }
    return NULL;
}

/* Open loop: a conversation that finds no free session waits, and its latency says so. Returns what to wait for. */
static double begin_due(double *arrival, double now) {
    while (may_begin(now)) {
        if (*arrival > now) return *arrival - now;
        Session *s = next_session();
        if (s == NULL) break;
        begin_conversation(s, *arrival);
        *arrival = next_arrival(*arrival);
    }
    return 1;
}

static void play(void) {
    struct epoll_event events[512];
    double arrival = began;
    bool timed = rate > 0 || ramp_seconds > 0;
    if (!timed)
        for (long i = 0; i < num_sessions && may_begin(began); i++) begin_conversation(&sessions[i], began);
    while (active || (timed && may_begin(now_seconds()))) {
        double wait = timed ? begin_due(&arrival, now_seconds()) : 60;
        int n = wait_events(poller, events, 512, wait);
        for (int i = 0; i < n; i++) {
            Session *s = events[i].data.ptr;
            if (s->fd >= 0 && events[i].events & EPOLLOUT) flush_session(s);
            if (s->fd >= 0 && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(s);
        }
    }
}

static void report(double elapsed) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                 1e-6 * (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
    printf("{\"turns\":%ld,\"errors\":%ld,\"conversations\":%ld,\"finished\":%ld,\"abandoned\":%ld,\"seconds\":%.6f,"
           "\"cpu_seconds\":%.6f,\"bytes_out\":%zu,\"bytes_in\":%zu}\n",
           turns_done, errors, started, finished, abandoned, elapsed, cpu, bytes_out, bytes_in);
}

int main(int argc, char **argv) {
    static const struct option options[] = {
        {"host", 1, 0, 'h'},       {"port", 1, 0, 'p'},          {"path", 1, 0, 'P'},       {"conversation", 1, 0, 'c'},
        {"sessions", 1, 0, 'n'},   {"conversations", 1, 0, 'N'}, {"turns", 1, 0, 't'},      {"seconds", 1, 0, 's'},
        {"rate", 1, 0, 'r'},       {"ramp-seconds", 1, 0, 'R'},  {"stream", 0, 0, 'S'},     {"tools", 0, 0, 'T'},
        {"session-header", 0, 0, 'H'}, {"name", 1, 0, 'i'},      {"records", 1, 0, 'o'},    {"wait-after", 1, 0, 'w'},
        {"wait-every", 1, 0, 'W'},
        {"max-tokens", 1, 0, 'm'}, {"dump", 1, 0, 'd'},          {"header", 1, 0, 'k'},     {"seed", 1, 0, 'e'},
        {0, 0, 0, 0},
    };
    const char *conversation = NULL, *record_file = NULL;
    unsigned seed = 1;
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (o) {
        case 'h': host = optarg; break;
        case 'p': port = atoi(optarg); break;
        case 'P': path = optarg; break;
        case 'c': conversation = optarg; break;
        case 'n': num_sessions = atol(optarg); break;
        case 'N': num_conversations = atol(optarg); break;
        case 't': num_turns = atol(optarg); break;
        case 's': seconds = atof(optarg); break;
        case 'r': rate = atof(optarg); break;
        case 'R': ramp_seconds = atof(optarg); break;
        case 'S': streamed = true; break;
        case 'T': tools = true; break;
        case 'H': session_header = true; break;
        case 'i': name = optarg; break;
        case 'o': record_file = optarg; break;
        case 'w': wait_after = atol(optarg); break;
        case 'W': wait_every = atol(optarg); break;
        case 'm': {
            char *to = strchr(optarg, '-');
            max_tokens_from = atol(optarg);
            max_tokens_to = to ? atol(to + 1) : max_tokens_from;
            break;
        }
        case 'd': dump = optarg; break;
        case 'k': key_header = optarg; break;
        case 'e': seed = (unsigned)atol(optarg); break;
        default: return 2;
        }
    }
    if (conversation == NULL || port == 0 || (num_conversations == 0 && seconds == 0) || num_sessions < 1 || num_turns < 1)
        die("generator: --port, --conversation and one of --conversations and --seconds are needed");
    signal(SIGPIPE, SIG_IGN);
    srandom(seed);
    read_conversation(conversation);
    address = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) die("generator: --host takes an IPv4 address, not %s", host);
    if (record_file && (records = fopen(record_file, "w")) == NULL)
        die("generator: cannot write %s: %s", record_file, strerror(errno));
    poller = epoll_create1(EPOLL_CLOEXEC);
    sessions = calloc((size_t)num_sessions, sizeof *sessions);
    for (long i = 0; i < num_sessions; i++) sessions[i].fd = -1;
    began = now_seconds();
    if (seconds > 0) stops_at = began + seconds;
    play();
    double elapsed = now_seconds() - began;
    if (records) fclose(records);
    report(elapsed);
    return 0;
}
