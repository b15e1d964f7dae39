package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// client is one way to request a token with an unmodified client library or program, and its expected result for each
// kind of answer. A credential chain decides by the type of the error whether to try the next credential. Therefore the
// type is part of the expected result.
type client struct {
	library    string
	credential string // subcommand of the program in e2e/clients; curl has none
	names      string // the flag that selects the identity; env: AZURE_CLIENT_ID selects it; "": the client selects none
	probes     int    // requests without the Metadata header that its log shows before the token request
	refused    string // the result for status 400
	chained    string // the result of a chain for status 400
	throttled  string // the result if every answer is 429
}

const (
	gotToken          = "token"
	gotNextCredential = "next credential"
	stillRetries      = "still retries"
	notApplicable     = ""

	// The errors of azidentity. A chain tries the next credential only after a credentialUnavailableError.
	stops       = "AuthenticationFailedError 400"
	unassigned  = "credentialUnavailableError 400"
	throttledGo = "AuthenticationFailedError 429"
	// The errors of @azure/identity. A chain returns an AggregateAuthenticationError after all its credentials failed.
	unavailable = "CredentialUnavailableError 400"
	aggregate   = "AggregateAuthenticationError 400"
)

var clients = []client{
	{"azidentity 1.15.0", "managed", "", 0, unassigned, gotNextCredential, throttledGo},
	{"azidentity 1.15.0", "managed", "client-id", 0, stops, stops, throttledGo},
	{"azidentity 1.15.0", "managed", "object-id", 0, stops, stops, throttledGo},
	{"azidentity 1.15.0", "managed", "resource-id", 0, stops, stops, throttledGo},
	{"azidentity 1.15.0", "default", "", 1, unassigned, gotNextCredential, throttledGo},
	{"azidentity 1.15.0", "default", "env", 1, stops, stops, throttledGo},
	{"adal 0.9.24", "adal", "", 0, "tokenRefreshError 400", notApplicable, stillRetries},
	{"adal 0.9.24", "adal", "client-id", 0, "tokenRefreshError 400", notApplicable, stillRetries},
	{"adal 0.9.24", "adal", "resource-id", 0, "tokenRefreshError 400", notApplicable, stillRetries},
	{"@azure/identity 4.14.1", "managed", "", 0, unavailable, gotNextCredential, "CredentialUnavailableError 429"},
	{"@azure/identity 4.14.1", "managed", "client-id", 0, unavailable, gotNextCredential, "CredentialUnavailableError 429"},
	{"@azure/identity 4.14.1", "managed", "object-id", 0, unavailable, gotNextCredential, "CredentialUnavailableError 429"},
	{"@azure/identity 4.14.1", "managed", "resource-id", 0, unavailable, gotNextCredential, "CredentialUnavailableError 429"},
	{"@azure/identity 4.14.1", "default", "", 1, aggregate, aggregate, "AggregateAuthenticationError 429"},
	{"@azure/identity 4.14.1", "default", "env", 1, aggregate, aggregate, "AggregateAuthenticationError 429"},
	{"@azure/identity 2.1.0", "managed", "", 1, unavailable, gotNextCredential, "AuthenticationError 429"},
	{"@azure/identity 2.1.0", "managed", "client-id", 1, unavailable, gotNextCredential, "AuthenticationError 429"},
	{"@azure/identity 2.1.0", "managed", "resource-id", 1, unavailable, gotNextCredential, "AuthenticationError 429"},
	{"@azure/identity 2.1.0", "default", "", 1, aggregate, aggregate, "AuthenticationError 429"},
	{"curl", "curl", "", 0, "HTTP 400", notApplicable, stillRetries},
	{"curl", "curl", "client-id", 0, "HTTP 400", notApplicable, stillRetries},
}

// tokenQuery is a token request: the pod that sends it, the identity and resource, and a time limit.
type tokenQuery struct {
	pod      string
	identity azure.Identity // the expected identity; a client that selects an identity selects this one
	resource string
	chain    bool // use the credential in a chain, before a credential that always returns a token
	timeout  time.Duration
}

// clientResult is the result of a client run.
type clientResult struct {
	outcome  string        // as in the table of clients, or a problem such as "wrong token"
	text     string        // of the error
	took     time.Duration // as the program reports it, without its start; otherwise of the whole run
	statuses []int
}

// clientRunner runs clients in the network namespaces of pods.
type clientRunner struct {
	*testNamespace
	goclient string
	nice     string
	curl     string
	node     string
	script   string
	modules  map[string]string // NODE_PATH by library
	netns    map[string]*os.File
}

func newClientRunner(t *testing.T) *clientRunner {
	t.Helper()
	l := &clientRunner{testNamespace: newNamespace(t), modules: map[string]string{}, netns: map[string]*os.File{}}
	repo, err := cluster.RepoDir()
	must(t, err)
	l.script = filepath.Join(repo, "e2e", "clients", "client.js")
	l.goclient, _, err = cluster.BuildClient(t.Context())
	must(t, err)
	// The clients run with a PATH that contains no programs, so the paths of programs are absolute.
	l.nice, err = exec.LookPath("nice")
	must(t, err)
	l.curl, err = exec.LookPath("curl")
	must(t, err)
	install := func(folder string) string {
		modules, err := cluster.NodeModules(t.Context(), func(line string) { fmt.Println("e2e:", line) }, folder)
		must(t, err)
		return modules
	}
	l.modules["@azure/identity 4.14.1"] = install("clients/js4")
	l.modules["@azure/identity 2.1.0"] = install("clients/js2")
	// The Node.js of clients/node runs both libraries. Debian's Node.js is too old for the newer library.
	node, err := filepath.Glob(filepath.Join(install("clients/node"), "node-linux-*", "bin", "node"))
	must(t, err)
	if len(node) != 1 {
		t.Fatalf("npm installed %v; want one Node.js binary for this computer's architecture", node)
	}
	l.node = node[0]
	return l
}

// startPod starts a pod and opens its network namespace for clients.
func (l *clientRunner) startPod(pod, label, node string) {
	l.t.Helper()
	l.pod(pod, label, node)
	netns, err := testCluster.PodNetns(l.t.Context(), l.name, pod)
	must(l.t, err)
	l.netns[pod] = netns
	l.t.Cleanup(func() { netns.Close() })
}

// command returns the command that runs the client. Its environment has only the variables set here: no proxy, no
// endpoint address, and no command-line tools that a credential chain might find.
func (l *clientRunner) command(ctx context.Context, c client, q tokenQuery, wait bool) *exec.Cmd {
	env := []string{"PATH=/nonexistent", "HOME=/nonexistent"}
	args := []string{c.credential, "--resource", q.resource}
	switch c.names {
	case "env":
		env = append(env, "AZURE_CLIENT_ID="+q.identity.ClientID)
	case "client-id":
		args = append(args, "--client-id", q.identity.ClientID)
	case "object-id":
		args = append(args, "--object-id", q.identity.ObjectID)
	case "resource-id":
		args = append(args, "--resource-id", q.identity.ResourceID)
	}
	if q.chain {
		args = append(args, "--chain")
	}
	if wait {
		args = append(args, "--wait")
	}
	switch modules := l.modules[c.library]; {
	case c.library == "curl":
		url := "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + q.resource
		if c.names != "" {
			url += "&client_id=" + q.identity.ClientID
		}
		args = []string{l.curl, "-sv", "--retry", "20", "-H", "Metadata: true", url}
	case modules != "":
		args = append([]string{l.node, l.script}, args...)
		env = append(env, "NODE_PATH="+modules)
	default:
		args = append([]string{l.goclient}, args...)
	}
	// The clients get a higher priority, because other load on this computer can make them miss their own timeouts.
	cmd := exec.CommandContext(ctx, "nsenter", "--net=/proc/self/fd/3", "--", l.nice, "-n", "-15", args[0])
	cmd.Args = append(cmd.Args, args[1:]...)
	cmd.ExtraFiles = []*os.File{l.netns[q.pod]}
	cmd.Env = env
	return cmd
}

// run runs the client until it ends, or until the time limit of the query. Other goroutines can read logs in the
// meantime. If start is not nil, the program loads its library at once, but sends its first request only when start is
// closed, and the time limit begins at that time.
func (l *clientRunner) run(c client, q tokenQuery, logs *clientLog, start <-chan struct{}) clientResult {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	cmd := l.command(ctx, c, q, start != nil)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, logs
	began, err := l.start(cmd, c, start)
	limit := time.AfterFunc(q.timeout, cancel)
	defer limit.Stop()
	if err == nil {
		err = cmd.Wait()
	}
	r := clientResult{took: time.Since(began), statuses: logs.statuses()}
	if ctx.Err() != nil {
		r.outcome = stillRetries
		return r
	}
	got, readErr := l.read(c, out.Bytes(), r.statuses)
	switch {
	case readErr != nil:
		r.outcome, r.text = "failed", fmt.Sprintf("%v, %v: %s%s", err, readErr, out.String(), logs)
		return r
	case got.DurationMS > 0:
		r.took = time.Duration(got.DurationMS * float64(time.Millisecond))
	}
	r.outcome, r.text = evaluate(got, r, q)
	return r
}

// maxProbeAttempts is the maximum number of times that runUntilResponse runs a client.
const maxProbeAttempts = 3

// runUntilResponse runs a client. If the client sends probes and ends without a response, runUntilResponse runs it
// again. The probe of some clients has a timeout of 300 ms, in which they also load code. On a busy computer this
// timeout can pass before NMI has answered, although NMI works as it should.
func (l *clientRunner) runUntilResponse(scenario string, c client, q tokenQuery, logs *clientLog, start <-chan struct{}) clientResult {
	for attempt := 1; ; attempt++ {
		r := l.run(c, q, logs, start)
		if c.probes == 0 || len(r.statuses) > 0 || attempt == maxProbeAttempts {
			return r
		}
		l.t.Logf("%s: %s %s %s gave up after %.2f s without a response", scenario, c.library, c.credential, c.names, r.took.Seconds())
		logs.reset()
	}
}

// start starts the client, and returns the time from which the client may send requests. If the channel is nil, that is
// the time of the start. Otherwise it is the time when the channel is closed: until then the client only loads its
// library. curl cannot wait after its start, so it is started only when the channel is closed.
func (l *clientRunner) start(cmd *exec.Cmd, c client, start <-chan struct{}) (time.Time, error) {
	if start == nil || c.library == "curl" {
		if start != nil {
			<-start
		}
		return time.Now(), cmd.Start()
	}
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	<-start
	if err == nil {
		err = in.Close()
	}
	return time.Now(), err
}

// clientOutput is the JSON line that a program in e2e/clients writes to standard output. For curl, read fills it from
// the responses.
type clientOutput struct {
	OK          bool
	Token       string
	ExpiresOn   int64 `json:"expires_on"`
	Kind, Error string
	Statuses    []int
	DurationMS  float64 `json:"duration_ms"`
}

func (l *clientRunner) read(c client, out []byte, statuses []int) (clientOutput, error) {
	var s clientOutput
	if c.library != "curl" {
		return s, json.Unmarshal(out, &s)
	}
	var body map[string]string
	for d := json.NewDecoder(bytes.NewReader(out)); d.More(); { // one body for each attempt
		body = nil
		if err := d.Decode(&body); err != nil {
			return s, err
		}
	}
	if len(statuses) == 0 {
		return s, fmt.Errorf("no response")
	}
	s.OK, s.Token, s.Kind, s.Error = statuses[len(statuses)-1] == 200, body["access_token"], "HTTP", body["error_description"]
	s.ExpiresOn, _ = strconv.ParseInt(body["expires_on"], 10, 64)
	return s, nil
}

// evaluate returns the outcome in the words of the table of clients. If the client got a token that is not the expected
// one, the outcome is a problem such as "wrong token".
func evaluate(got clientOutput, r clientResult, q tokenQuery) (outcome, text string) {
	if !got.OK {
		last := 0
		if len(r.statuses) > 0 {
			last = r.statuses[len(r.statuses)-1]
		}
		return fmt.Sprintf("%s %d", got.Kind, last), got.Error
	}
	if got.Token == "of the next credential" {
		return gotNextCredential, ""
	}
	claims, err := fakeAzure.Verify(got.Token)
	if err != nil {
		return "bad token", err.Error()
	}
	if claims.AppID != q.identity.ClientID || claims.ObjectID != q.identity.ObjectID || claims.Audience != q.resource || claims.TenantID != cluster.TenantID {
		return "wrong token", fmt.Sprintf("the token has appid %s, oid %s and audience %s; want %+v and %s", claims.AppID, claims.ObjectID, claims.Audience, q.identity, q.resource)
	}
	// Some libraries add expires_in to the start of the request. The expiry that they report is too early by up to the
	// duration of the request.
	if off := time.Duration(claims.Expires.Unix()-got.ExpiresOn) * time.Second; off < -2*time.Second || off > r.took+2*time.Second {
		return "wrong expiry", fmt.Sprintf("the token expires at %d, the library reports %d", claims.Expires.Unix(), got.ExpiresOn)
	}
	return gotToken, ""
}

// clientLog is what a client writes to standard error while it runs. It has a line for each request and for each
// response.
type clientLog struct {
	client client
	mu     sync.Mutex
	text   bytes.Buffer
}

func (d *clientLog) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text.Write(p)
}

func (d *clientLog) reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.text.Reset()
}

func (d *clientLog) String() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text.String()
}

// These patterns match lines of the programs in e2e/clients. All but readyLine also match lines of curl -v.
var (
	readyLine   = regexp.MustCompile(`(?m)^ready$`)
	requestLine = regexp.MustCompile(`(?m)^(?:request$|> GET )`)
	statusLine  = regexp.MustCompile(`(?m)^(?:response|< HTTP/1\.1) (\d{3})`)
)

// isReady reports whether the client, started with --wait, has loaded its library. curl has no library to load.
func (d *clientLog) isReady() bool {
	return d.client.library == "curl" || readyLine.MatchString(d.String())
}

// isWaiting reports whether the client has sent its token request and has no response yet.
func (d *clientLog) isWaiting() bool {
	return len(d.statuses()) == d.client.probes && len(requestLine.FindAllString(d.String(), -1)) == d.client.probes+1
}

// statuses returns the statuses of the responses so far.
func (d *clientLog) statuses() []int {
	var all []int
	for _, match := range statusLine.FindAllStringSubmatch(d.String(), -1) {
		n, _ := strconv.Atoi(match[1])
		all = append(all, n)
	}
	return all
}

// scenario is one kind of query that many clients send. ask returns the query of a client, its expected outcome, and
// whether the scenario applies to the client. during is called while the clients run.
type scenario struct {
	name        string
	ask         func(c client) (q tokenQuery, want string, applies bool)
	concurrency int // number of clients that run at the same time; 0: all, which send their first requests together
	switches    map[string]string
	during      func(logs []*clientLog)
	check       func(c client, r clientResult) string // returns a further problem, or ""
}

// runScenario runs a scenario and checks the outcome of each client. It returns the cells of the scenario's column in
// the table.
func (l *clientRunner) runScenario(e scenario) map[client]string {
	l.t.Helper()
	setFaults(l.t, e.switches)
	limit := e.concurrency
	if limit == 0 {
		limit = len(clients)
	}
	slots := make(chan struct{}, limit)
	var together chan struct{}
	open := func() {}
	if e.concurrency == 0 {
		together = make(chan struct{})
		open = sync.OnceFunc(func() { close(together) })
	}
	var wait sync.WaitGroup
	// The clients must not outlive the test. These calls are deferred because waitUntilReady and during can end the test.
	defer wait.Wait()
	defer open()
	var mu sync.Mutex
	var all []*clientLog
	cells := map[client]string{}
	for _, c := range clients {
		q, want, applies := e.ask(c)
		if !applies {
			continue
		}
		logs := &clientLog{client: c}
		all = append(all, logs)
		wait.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			r := l.runUntilResponse(e.name, c, q, logs, together)
			mu.Lock()
			defer mu.Unlock()
			cells[c] = fmt.Sprintf("%s, %.2f s, %d×", r.outcome, r.took.Seconds(), len(r.statuses))
			problem := ""
			if r.outcome != want {
				problem = "want " + want
			} else if e.check != nil {
				problem = e.check(c, r)
			}
			if problem != "" {
				l.t.Errorf("%s: %s %s %s: got %s, statuses %v; %s\n%s", e.name, c.library, c.credential, c.names, cells[c], r.statuses, problem, r.text)
			}
		})
	}
	if together != nil {
		l.waitUntilReady(all)
		open()
	}
	if e.during != nil {
		e.during(all)
	}
	wait.Wait()
	return cells
}

// waitUntilReady waits until each client has loaded its library. Without this wait, on a busy computer, some clients
// would end their retries before the slowest client has loaded its library.
func (l *clientRunner) waitUntilReady(logs []*clientLog) {
	l.t.Helper()
	eventually(l.t, 3*time.Minute, func() error {
		for _, d := range logs {
			if !d.isReady() {
				return fmt.Errorf("%+v has not loaded its library yet: %s", d.client, d)
			}
		}
		return nil
	})
}

// cores returns how many clients run at the same time in scenarios that do not need all clients at the same time.
func cores() int { return 2 * runtime.NumCPU() }

// printTable logs the matrix as a Markdown table.
func printTable(t *testing.T, columns []string, cells map[string]map[client]string) {
	var b strings.Builder
	b.WriteString("\n| client | identity by | " + strings.Join(columns, " | ") + " |\n" + strings.Repeat("|---", len(columns)+2) + "|\n")
	for _, c := range clients {
		fmt.Fprintf(&b, "| %s `%s` | %s |", c.library, c.credential, c.names)
		for _, column := range columns {
			cell := cells[column][c]
			if cell == "" {
				cell = "–"
			}
			fmt.Fprintf(&b, " %s |", cell)
		}
		b.WriteString("\n")
	}
	t.Log(b.String())
}
