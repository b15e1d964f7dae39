//go:build ignore

// Capture of connections to the metadata service, and identification of their owners, by cgroup. Package bpf attaches
// these programs to the cgroup of the node's pods. Its documentation says what they protect against.
//
// All addresses and ports are in network byte order, as in the kernel's structures. The programs need kernel 5.14.

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

// Results of the programs. After REFUSE the system call that connects or sends fails with EPERM.
#define REFUSE 0
#define ALLOW 1

#define TCP_SYN 0x02 // the flag in a TCP header

// Below the cgroup of all pods, the cgroup of a pod is at the first level (guaranteed pods) or at the second, below the
// folder of its quality of service class. The cgroup of a container is one level below that of its pod.
#define OWNER_LEVELS 3

// MAX_LEVELS bounds the depth of the cgroup of all pods in the hierarchy.
#define MAX_LEVELS 16

struct endpoint {
	__u32 ip;
	__u16 port;
	__u16 unused;
};

struct capture_settings {
	struct endpoint listener; // of NMI, for redirected connections
	struct endpoint metadata; // what is captured
	__u64 root;		  // ID of the cgroup of all pods
	__u64 host_netns;	  // cookie of the node's network namespace
	__u64 capture_host;	  // 1 if pods in the host network are captured
};

// settings is a hash map, because an update of its only element is atomic: a program sees all old or all new settings.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct capture_settings);
} settings SEC(".maps");

// exempt_pods has the cgroup IDs of pods in the host network that reach the metadata service itself although capture_host
// is set: NMI, and the pods that NMI does not serve. It has no effect on sockets in other network namespaces, so a wrong
// entry releases no pod outside the host network.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u8);
} exempt_pods SEC(".maps");

// owner has the IDs of the cgroups at the first OWNER_LEVELS levels below the cgroup of all pods, 0 where a level does
// not exist. A cgroup that a container creates below its own is deeper, so it does not hide the container and the pod.
struct owner {
	__u64 cgroups[OWNER_LEVELS];
};

// connecting describes a socket that connects to NMI.
struct connecting {
	struct owner owner; // of the process that called connect
	__u64 redirected;   // 1 if the process dialed the metadata service
	__u64 token;	    // of this connection
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct connecting);
} sockets SEC(".maps");

struct connection_record {
	struct owner owner;
	__u64 established; // in ns of CLOCK_MONOTONIC
};

// token_key is the secret key of the tokens. Each installation replaces it.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64[2]);
} token_key SEC(".maps");

// connections has the record of each established connection to NMI, by the token of its SYN. NMI reads and deletes a record
// when it accepts the connection. Address and port of the client are no key: a pod can create network namespaces that have
// the addresses of another pod and of NMI.
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, __u64);
	__type(value, struct connection_record);
} connections SEC(".maps");

// token_option is the TCP option of a SYN to NMI. It has the form of RFC 6994, for options that are not registered.
struct token_option {
	__u8 kind;
	__u8 length;
	__u16 experiment;
	__u64 token;
} __attribute__((packed));

#define TOKEN_KIND 254
#define TOKEN_EXPERIMENT 0x5049 // in network byte order

// host_sockets marks the sockets that were created in the node's network namespace after the installation.
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u8);
} host_sockets SEC(".maps");

// older_host_sockets has the cookies of sockets in the node's network namespace that were connected to the metadata
// service at the time of the installation.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u8);
} older_host_sockets SEC(".maps");

static __always_inline struct capture_settings *get_settings(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&settings, &zero);
}

static __always_inline int is_exempt(__u64 cgroup)
{
	return bpf_map_lookup_elem(&exempt_pods, &cgroup) != NULL;
}

// caller_level returns the level of the cgroup of all pods in the hierarchy, or -1 if the calling process is outside
// that cgroup. It then uses a socket that a pod created and passed to it, or it has left the cgroup since it created
// the socket.
static __always_inline int caller_level(const struct capture_settings *s)
{
	for (int level = 0; level < MAX_LEVELS; level++)
		if (bpf_get_current_ancestor_cgroup_id(level) == s->root)
			return level;
	return -1;
}

static __always_inline int caller_is_exempt(const struct capture_settings *s)
{
	int level = caller_level(s);

	return level >= 0 && (is_exempt(bpf_get_current_ancestor_cgroup_id(level + 1)) ||
			      is_exempt(bpf_get_current_ancestor_cgroup_id(level + 2)));
}

// must_capture reports whether connections of the caller to ip are captured.
static __always_inline int must_capture(struct bpf_sock_addr *ctx, const struct capture_settings *s, __u32 ip)
{
	if (ip != s->metadata.ip)
		return 0;
	if (bpf_get_netns_cookie(ctx) != s->host_netns)
		return 1;
	return s->capture_host && !caller_is_exempt(s);
}

static __always_inline __u64 rotate(__u64 x, int bits)
{
	return x << bits | x >> (64 - bits);
}

static __always_inline void sip_rounds(__u64 v[4], int rounds)
{
	for (int i = 0; i < rounds; i++) {
		v[0] += v[1];
		v[2] += v[3];
		v[1] = rotate(v[1], 13) ^ v[0];
		v[3] = rotate(v[3], 16) ^ v[2];
		v[0] = rotate(v[0], 32);
		v[2] += v[1];
		v[0] += v[3];
		v[1] = rotate(v[1], 17) ^ v[2];
		v[3] = rotate(v[3], 21) ^ v[0];
		v[2] = rotate(v[2], 32);
	}
}

// siphash returns SipHash-2-4 of two words, see https://www.aumasson.jp/siphash/siphash.pdf.
static __always_inline __u64 siphash(const __u64 key[2], __u64 first, __u64 second)
{
	const __u64 length = 16ULL << 56; // the last block has the length of the input in bytes
	__u64 v[4] = {
		key[0] ^ 0x736f6d6570736575ULL,
		key[1] ^ 0x646f72616e646f6dULL,
		key[0] ^ 0x6c7967656e657261ULL,
		key[1] ^ 0x7465646279746573ULL,
	};

	v[3] ^= first;
	sip_rounds(v, 2);
	v[0] ^= first;
	v[3] ^= second;
	sip_rounds(v, 2);
	v[0] ^= second;
	v[3] ^= length;
	sip_rounds(v, 2);
	v[0] ^= length;
	v[2] ^= 0xff;
	sip_rounds(v, 4);
	return v[0] ^ v[1] ^ v[2] ^ v[3];
}

// make_token returns a token that no pod can predict. bpf_get_prandom_u32 would not do: from some of its numbers the others can
// be computed. The input of the hash is different for each call, because a socket has one connect at a time.
static __always_inline __u64 make_token(struct bpf_sock_addr *ctx)
{
	__u32 zero = 0;
	__u64 *key = bpf_map_lookup_elem(&token_key, &zero);

	return key ? siphash(key, bpf_get_socket_cookie(ctx), bpf_ktime_get_ns()) : 0;
}

// store_owner stores the owner of the socket in ctx. It returns 0 if it cannot.
static __always_inline int store_owner(struct bpf_sock_addr *ctx, const struct capture_settings *s, __u64 redirected)
{
	struct bpf_sock *sk = ctx->sk;
	int level = caller_level(s);
	struct connecting *c;

	if (!sk || level < 0)
		return 0;
	c = bpf_sk_storage_get(&sockets, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!c)
		return 0;
	c->redirected = redirected;
	c->token = make_token(ctx);
	for (int i = 0; i < OWNER_LEVELS; i++)
		c->owner.cgroups[i] = bpf_get_current_ancestor_cgroup_id(level + 1 + i);
	return 1;
}

// on_connect decides about a connect to ip and the port in ctx. If the caller must redirect it, redirect is the listener.
static __always_inline int on_connect(struct bpf_sock_addr *ctx, __u32 ip, struct endpoint *redirect)
{
	struct capture_settings *s = get_settings();
	__u16 port = ctx->user_port;

	if (!s)
		return ALLOW;
	// A sidecar proxy may intercept the redirected connection, then connect to the listener itself. Record its owner
	// too; NMI closes connections without an owner.
	if (ip == s->listener.ip && port == s->listener.port && ctx->protocol == IPPROTO_TCP)
		return store_owner(ctx, s, 0) ? ALLOW : REFUSE;
	if (!must_capture(ctx, s, ip))
		return ALLOW;
	if (port != s->metadata.port || ctx->protocol != IPPROTO_TCP)
		return REFUSE;
	if (!store_owner(ctx, s, 1))
		return REFUSE;
	*redirect = s->listener;
	return ALLOW;
}

SEC("cgroup/connect4")
int capture_connect4(struct bpf_sock_addr *ctx)
{
	struct endpoint redirect = {};
	int result = on_connect(ctx, ctx->user_ip4, &redirect);

	if (redirect.port) {
		ctx->user_ip4 = redirect.ip;
		ctx->user_port = redirect.port;
	}
	return result;
}

// is_mapped reports whether the address in ctx is an IPv4 address in IPv6 form: ::ffff:a.b.c.d.
static __always_inline int is_mapped(struct bpf_sock_addr *ctx)
{
	return ctx->user_ip6[0] == 0 && ctx->user_ip6[1] == 0 && ctx->user_ip6[2] == bpf_htonl(0xffff);
}

// A connect of an IPv6 socket to an IPv4-mapped address runs this program and not capture_connect4.
SEC("cgroup/connect6")
int capture_connect6(struct bpf_sock_addr *ctx)
{
	struct endpoint redirect = {};
	int result;

	if (!is_mapped(ctx))
		return ALLOW;
	result = on_connect(ctx, ctx->user_ip6[3], &redirect);
	if (redirect.port) {
		ctx->user_ip6[3] = redirect.ip;
		ctx->user_port = redirect.port;
	}
	return result;
}

// settings_if_redirected returns the settings if the peer of the socket in ctx, with address ip, is the listener, and the
// process dialed the metadata service.
static __always_inline struct capture_settings *settings_if_redirected(struct bpf_sock_addr *ctx, __u32 ip)
{
	struct capture_settings *s = get_settings();
	struct bpf_sock *sk = ctx->sk;
	struct connecting *c;

	if (!s || !sk || ip != s->listener.ip || ctx->user_port != s->listener.port)
		return NULL;
	c = bpf_sk_storage_get(&sockets, sk, NULL, 0);
	return c && c->redirected ? s : NULL;
}

SEC("cgroup/getpeername4")
int show_dialed4(struct bpf_sock_addr *ctx)
{
	struct capture_settings *s = settings_if_redirected(ctx, ctx->user_ip4);

	if (s) {
		ctx->user_ip4 = s->metadata.ip;
		ctx->user_port = s->metadata.port;
	}
	return ALLOW;
}

SEC("cgroup/getpeername6")
int show_dialed6(struct bpf_sock_addr *ctx)
{
	struct capture_settings *s = is_mapped(ctx) ? settings_if_redirected(ctx, ctx->user_ip6[3]) : NULL;

	if (s) {
		ctx->user_ip6[3] = s->metadata.ip;
		ctx->user_port = s->metadata.port;
	}
	return ALLOW;
}

// connects_to_nmi returns what is stored of the socket in ctx, if it connects to NMI.
static __always_inline struct connecting *connects_to_nmi(struct bpf_sock_ops *ctx)
{
	struct capture_settings *s = get_settings();
	struct bpf_sock *sk = ctx->sk;

	if (!s || !sk || ctx->remote_ip4 != s->listener.ip || bpf_ntohl(ctx->remote_port) != bpf_ntohs(s->listener.port))
		return NULL;
	return bpf_sk_storage_get(&sockets, sk, NULL, 0);
}

// write_token writes the token into the SYN.
static __always_inline void write_token(struct bpf_sock_ops *ctx, const struct connecting *c)
{
	struct token_option option = {
		.kind = TOKEN_KIND,
		.length = sizeof(option),
		.experiment = bpf_htons(TOKEN_EXPERIMENT),
		.token = c->token,
	};

	bpf_store_hdr_opt(ctx, &option, sizeof(option), 0);
}

// record_connection writes a token into the SYN of a connection to NMI, and records the owner of the connection by the
// token when the client's kernel receives the SYN-ACK, which is before the server can accept the connection.
SEC("sockops")
int record_connection(struct bpf_sock_ops *ctx)
{
	struct connection_record record = {};
	struct connecting *c;

	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		if (connects_to_nmi(ctx))
			bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		if (ctx->skb_tcp_flags & TCP_SYN && connects_to_nmi(ctx))
			bpf_reserve_hdr_opt(ctx, sizeof(struct token_option), 0);
		break;
	case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
		c = ctx->skb_tcp_flags & TCP_SYN ? connects_to_nmi(ctx) : NULL;
		if (c)
			write_token(ctx, c);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		c = connects_to_nmi(ctx);
		if (!c)
			break;
		record.owner = c->owner;
		record.established = bpf_ktime_get_ns();
		bpf_map_update_elem(&connections, &c->token, &record, BPF_ANY);
		break;
	}
	return 1;
}

SEC("cgroup/sock_create")
int mark_host_socket(struct bpf_sock *ctx)
{
	struct capture_settings *s = get_settings();

	if (s && bpf_get_netns_cookie(ctx) == s->host_netns)
		bpf_sk_storage_get(&host_sockets, ctx, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	return ALLOW;
}

static __always_inline int is_host_socket(struct __sk_buff *skb, struct bpf_sock *sk)
{
	__u64 cookie = bpf_get_socket_cookie(skb);

	return bpf_sk_storage_get(&host_sockets, sk, NULL, 0) || bpf_map_lookup_elem(&older_host_sockets, &cookie);
}

static __always_inline int socket_is_exempt(struct __sk_buff *skb, const struct capture_settings *s)
{
	for (int level = 0; level < MAX_LEVELS; level++)
		if (bpf_skb_ancestor_cgroup_id(skb, level) == s->root)
			return is_exempt(bpf_skb_ancestor_cgroup_id(skb, level + 1)) ||
			       is_exempt(bpf_skb_ancestor_cgroup_id(skb, level + 2));
	return 0;
}

// drop_metadata drops packets to the metadata service that no program above redirects or refuses: datagrams, and packets
// of raw sockets and of sockets that were connected before the installation.
SEC("cgroup_skb/egress")
int drop_metadata(struct __sk_buff *skb)
{
	struct capture_settings *s = get_settings();
	struct bpf_sock *sk = skb->sk;
	__u32 destination;

	if (!s || skb->protocol != bpf_htons(ETH_P_IP))
		return ALLOW;
	if (bpf_skb_load_bytes(skb, offsetof(struct iphdr, daddr), &destination, sizeof(destination)))
		return ALLOW;
	if (destination != s->metadata.ip)
		return ALLOW;
	if (!sk)
		return REFUSE;
	sk = bpf_sk_fullsock(sk);
	if (!sk || !is_host_socket(skb, sk))
		return REFUSE;
	return !s->capture_host || socket_is_exempt(skb, s);
}

char license_of_programs[] SEC("license") = "Apache-2.0";
