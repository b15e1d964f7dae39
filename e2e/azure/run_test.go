package azure

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

func TestAnAddressInUseIsReported(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	s := start(t)
	for says, change := range map[string]func(*Config){
		"listening on " + taken.Addr().String() + " for IMDS":     func(c *Config) { c.IMDSAddr = taken.Addr().String() },
		"listening on " + taken.Addr().String() + " for Entra ID": func(c *Config) { c.EntraAddr = taken.Addr().String() },
		"is in use by a running process":                          func(c *Config) { c.ControlSocket = s.socket },
		"the kernel allows 107":                                   func(c *Config) { c.ControlSocket = "/" + strings.Repeat("x", 120) },
		`tenant "nobody" is not a GUID`:                           func(c *Config) { c.Tenant = "nobody" },
		"overlaps":                                                func(c *Config) { c.Nodes[1].Sources = c.Nodes[0].Sources },
		`node "a" is given twice`:                                 func(c *Config) { c.Nodes[1].Name = "a" },
	} {
		cfg := testConfig(t.TempDir())
		change(&cfg)
		if err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("want an error that contains %q, got %v", says, err)
		}
	}
	s.must(s.Ready(t.Context()))
}

func TestARestartReplacesAStaleSocketAndKeepsTheKeys(t *testing.T) {
	dir, err := os.MkdirTemp("", "azure")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "stale")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false) // as if its process had been killed
	stale.Close()
	first := start(t)
	first.add(red)
	token := first.get(nodeA, tokenQuery).token(t).AccessToken
	second := start(t, func(c *Config) { c.ControlSocket = socket })
	if _, err := second.Verify(token); err != nil {
		t.Errorf("the token that was issued before the restart does not verify: %v", err)
	}
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket %v, error %v; want mode 0600", info, err)
	}
}

func TestAConfigurationCanBeWrittenAndRead(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.Nodes[0].SystemAssigned = &system
	file := filepath.Join(t.TempDir(), "config.json")
	data, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := LoadConfig(file)
	if err != nil || !reflect.DeepEqual(got, cfg) {
		t.Errorf("got configuration %+v, error %v; want the configuration that was written", got, err)
	}
	if err := os.WriteFile(file, []byte(`{"imdsAdr":""}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(file); err == nil || !strings.Contains(err.Error(), "imdsAdr") {
		t.Errorf("a configuration with an unknown field: got error %v, want it to name imdsAdr", err)
	}
}

func TestNewHostsGetANewCertificateOfTheSameCA(t *testing.T) {
	dir := t.TempDir()
	defer syscall.Umask(syscall.Umask(0o077)) // the CA certificate must be readable whatever the umask is
	before, err := openState(dir, []string{"127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	after, err := openState(dir, []string{"127.0.0.1", "login.test"})
	if err != nil {
		t.Fatal(err)
	}
	again, err := openState(dir, []string{"login.test"})
	if err != nil {
		t.Fatal(err)
	}
	if string(before.caPEM) != string(after.caPEM) || !before.signing.Equal(after.signing) {
		t.Error("the CA certificate or the signing key changed")
	}
	if after.tls.Leaf.VerifyHostname("login.test") != nil || before.tls.Leaf.Equal(after.tls.Leaf) || !after.tls.Leaf.Equal(again.tls.Leaf) {
		t.Error("want a new TLS certificate for the new host login.test, and the same one again for login.test alone")
	}
	for file, mode := range map[string]os.FileMode{CAFile: 0o644, caKeyFile: 0o600, signingKeyFile: 0o600, tlsKeyFile: 0o600} {
		if info, err := os.Stat(filepath.Join(dir, file)); err != nil || info.Mode().Perm() != mode {
			t.Errorf("file %s: got %v, error %v; want private keys with mode 0600 and the CA with 0644",
				file, info, err)
		}
	}
}

func TestInvalidRegistrationsAreRefused(t *testing.T) {
	s := start(t)
	ctx := t.Context()
	s.add(red)
	bad := red
	bad.ClientID = "red"
	elsewhere := red
	elsewhere.ResourceID = "/subscriptions/s/red"
	twin := blue
	twin.ClientID = red.ClientID
	for says, err := range map[string]error{
		`clientID "red" is not a GUID`:              s.AddIdentity(ctx, bad),
		"is not the ID of a user-assigned identity": s.AddIdentity(ctx, elsewhere),
		"already belongs to " + red.ResourceID:      s.AddIdentity(ctx, twin),
		`no node "c"; the nodes are a, b`:           s.AddIdentity(ctx, blue, "c"),
		"no user-assigned identity":                 s.Detach(ctx, guid(77)),
		"is not PEM":                                s.AddApp(ctx, App{ClientID: guid(1), ObjectID: guid(2), Certificates: []string{"x"}}),
		"no application or user-assigned":           s.AddFederated(ctx, guid(78), newCluster(t).trusted()),
	} {
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("want an error that contains %q, got %v", says, err)
		}
	}
	list, err := s.Identities(ctx)
	s.must(err)
	if len(list) != 1 || list[0].ClientID != red.ClientID || len(list[0].Nodes) != 2 {
		t.Errorf("got identities %+v, want only red, on two nodes", list)
	}
	s.must(s.RemoveIdentity(ctx, guid(79)))
	if err := Dial(filepath.Join(t.TempDir(), "none")).Ready(context.Background()); err == nil || !strings.Contains(err.Error(), "request to the fake Azure at ") {
		t.Errorf("Ready with a socket that does not exist: got error %v, want a failed request to the fake Azure", err)
	}
}
