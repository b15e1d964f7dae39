package azure

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"sigs.k8s.io/yaml"
)

// Secret is a text that is not told: formatting or encoding it gives something else.
type Secret string

const redacted = "[...]"

func (Secret) String() string   { return redacted }
func (Secret) GoString() string { return redacted }

// MarshalText keeps the secret out of logs.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Config is how MIC reaches Azure: the fields of azure.json, the file that every node of AKS and other cloud providers
// has. It is comparable; two that are equal make clients that do the same.
type Config struct {
	Cloud    string `json:"cloud"`
	TenantID string `json:"tenantId"`
	// ClientID and ClientSecret are a service principal's. AKS writes "msi" where there is none.
	ClientID       string `json:"aadClientId"`
	ClientSecret   Secret `json:"aadClientSecret"`
	ClientCertPath string `json:"aadClientCertPath"`
	// SubscriptionID, ResourceGroup and VMType are read and not used: each node says itself which machine it is.
	SubscriptionID string `json:"subscriptionId"`
	ResourceGroup  string `json:"resourceGroup"`
	VMType         string `json:"vmType"`

	UseManagedIdentity bool `json:"useManagedIdentityExtension"`
	// UserAssignedIdentityID is the client ID of the managed identity that is MIC's own, or its resource ID. Empty is
	// the machine's system-assigned one.
	UserAssignedIdentityID string `json:"userAssignedIdentityID"`

	UseWorkloadIdentity bool   `json:"useFederatedWorkloadIdentityExtension"`
	FederatedTokenFile  string `json:"aadFederatedTokenFile"`

	// AuthorityHost is Entra ID's address where it is not the cloud's; see AZURE_AUTHORITY_HOST.
	AuthorityHost string `json:"-"`
	// Environment is the cloud that Azure's own list does not have.
	Environment Environment `json:"-"`

	// from is where the configuration is to be corrected.
	from string
}

// maxConfig bounds the files that are read here.
const maxConfig = 1 << 20

// LoadConfig reads azure.json, and then the environment, whose variables go before the file's fields. An empty path
// means the environment alone. The error says what to do, and holds nothing of what was read.
func LoadConfig(path string, getenv func(string) string) (Config, error) {
	cfg := Config{from: "the environment"}
	if path != "" {
		cfg.from = path
		text, err := readFile(path)
		if err != nil {
			return Config{}, fmt.Errorf("%w; give --cloudconfig a file that MIC may read, or an empty value and the environment", err)
		}
		if err := parse(text, &cfg); err != nil {
			return Config{}, fmt.Errorf("%s %w; correct it", path, err)
		}
	}
	cfg.ClientID, cfg.ClientSecret = withoutMSI(cfg.ClientID), Secret(withoutMSI(string(cfg.ClientSecret)))
	if err := cfg.applyEnvironment(getenv); err != nil {
		return Config{}, err
	}
	if isCustomCloud(cfg.Cloud) {
		environment, err := loadEnvironment(getenv(environmentFile))
		if err != nil {
			return Config{}, err
		}
		cfg.Environment = environment
	}
	return cfg, nil
}

// applyEnvironment takes what the environment says.
func (c *Config) applyEnvironment(getenv func(string) string) error {
	get := func(name string) string { return strings.TrimSpace(getenv(name)) }
	set := func(field *string, names ...string) {
		for _, name := range names {
			*field = cmp.Or(get(name), *field)
		}
	}
	set(&c.Cloud, "CLOUD")
	set(&c.TenantID, "TENANT_ID")
	set(&c.ClientID, "CLIENT_ID")
	set(&c.SubscriptionID, "SUBSCRIPTION_ID")
	set(&c.ResourceGroup, "RESOURCE_GROUP")
	set(&c.VMType, "VM_TYPE")
	set(&c.UserAssignedIdentityID, "USER_ASSIGNED_MSI_CLIENT_ID")
	c.ClientID = withoutMSI(c.ClientID)
	if secret := withoutMSI(get("CLIENT_SECRET")); secret != "" {
		// Whoever sets it means it, whatever the node's file says about the node.
		c.ClientSecret, c.UseManagedIdentity, c.UseWorkloadIdentity = Secret(secret), false, false
	}
	if use := get("USE_MSI"); use != "" {
		b, err := strconv.ParseBool(strings.ToLower(use))
		if err != nil {
			return errors.New("environment variable USE_MSI is neither true nor false; correct it")
		}
		c.UseManagedIdentity = b
	}
	// These are what the webhook of workload identity sets, and only in pods that ask for it.
	set(&c.FederatedTokenFile, "AZURE_FEDERATED_TOKEN_FILE")
	set(&c.AuthorityHost, "AZURE_AUTHORITY_HOST")
	if get("AZURE_FEDERATED_TOKEN_FILE") != "" {
		c.UseWorkloadIdentity = true
	}
	if c.UseWorkloadIdentity {
		set(&c.ClientID, "AZURE_CLIENT_ID")
		set(&c.TenantID, "AZURE_TENANT_ID")
	}
	return nil
}

// OwnIdentities returns the client ID, or resource ID, of the managed identity that MIC itself works with. It must never
// be detached.
func (c Config) OwnIdentities() []string {
	if c.UserAssignedIdentityID == "" {
		return nil
	}
	return []string{c.UserAssignedIdentityID}
}

// withoutMSI drops the word that AKS writes where a cluster has a managed identity and no service principal.
func withoutMSI(s string) string {
	if strings.EqualFold(strings.TrimSpace(s), "msi") {
		return ""
	}
	return s
}

func (c Config) source() string { return cmp.Or(c.from, "the configuration") }

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxConfig {
		return nil, fmt.Errorf("%s is larger than 1 MiB", path)
	}
	return text, nil
}

// parse reads JSON, or YAML, which the predecessor also took. Parsers quote what they stumble over, which may be a
// secret, so of their errors only the place is told.
func parse(text []byte, into any) error {
	text = bytes.TrimPrefix(text, []byte("\xef\xbb\xbf"))
	if len(bytes.TrimSpace(text)) == 0 {
		return errors.New("is empty")
	}
	err := yaml.Unmarshal(text, into)
	if err == nil {
		return nil
	}
	if mistyped := (*json.UnmarshalTypeError)(nil); errors.As(err, &mistyped) {
		if mistyped.Field == "" {
			return errors.New("holds no JSON object")
		}
		return fmt.Errorf("has something else than a %s in the field %q", mistyped.Type.Kind(), mistyped.Field)
	}
	var flaw *json.SyntaxError
	if errors.As(json.Unmarshal(text, new(any)), &flaw) && bytes.HasPrefix(bytes.TrimSpace(text), []byte("{")) {
		return fmt.Errorf("is not JSON from line %d on", 1+bytes.Count(text[:min(int(flaw.Offset), len(text))], []byte("\n")))
	}
	return errors.New("is neither JSON nor YAML")
}
