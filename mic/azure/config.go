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

// Secret is a string that formatting and encoding replace by a placeholder.
type Secret string

const redacted = "[...]"

func (Secret) String() string { return redacted }

// GoString keeps the secret out of messages with %#v.
func (Secret) GoString() string { return redacted }

// MarshalText keeps the secret out of logs.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Config says how MIC reaches Azure. Its fields are those of azure.json, the configuration file of the Azure cloud
// provider on every node. Configs are comparable; Clients with equal Configs behave the same.
type Config struct {
	Cloud    string `json:"cloud"`
	TenantID string `json:"tenantId"`
	// ClientID and ClientSecret are those of a service principal. AKS writes "msi" if there is none. With workload
	// identity ClientID is that of the workload identity.
	ClientID       string `json:"aadClientId"`
	ClientSecret   Secret `json:"aadClientSecret"`
	ClientCertPath string `json:"aadClientCertPath"`
	// SubscriptionID, ResourceGroup and VMType are read but not used: the provider ID of each node names its machine.
	SubscriptionID string `json:"subscriptionId"`
	ResourceGroup  string `json:"resourceGroup"`
	VMType         string `json:"vmType"`

	UseManagedIdentity bool `json:"useManagedIdentityExtension"`
	// UserAssignedIdentityID is the client ID or resource ID of the managed identity that MIC uses if UseManagedIdentity
	// is set. Empty means the system-assigned identity of the machine. In azure.json of AKS it is the identity of the
	// kubelet.
	UserAssignedIdentityID string `json:"userAssignedIdentityID"`

	UseWorkloadIdentity bool   `json:"useFederatedWorkloadIdentityExtension"`
	FederatedTokenFile  string `json:"aadFederatedTokenFile"`

	// AuthorityHost, from AZURE_AUTHORITY_HOST, overrides the cloud's address of Entra ID.
	AuthorityHost string `json:"-"`
	// Environment describes a custom cloud.
	Environment Environment `json:"-"`

	// from is the source of the configuration, for error messages.
	from string
}

// maxConfig bounds the size of configuration files.
const maxConfig = 1 << 20

// LoadConfig reads azure.json and then the environment, whose variables take precedence. If path is empty it reads only
// the environment. The error says what to do, and contains no value of the file.
func LoadConfig(path string, getenv func(string) string) (Config, error) {
	cfg := Config{from: "the environment"}
	if path != "" {
		cfg.from = path
		text, err := readFile(path)
		if err != nil {
			return Config{}, fmt.Errorf("%w; set --cloudconfig to a file that MIC can read, or to an empty value and configure MIC by environment variables", err)
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

// applyEnvironment overrides fields with environment variables.
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
		// CLIENT_SECRET is for MIC, and azure.json describes the node. So CLIENT_SECRET replaces the credentials of
		// azure.json.
		c.ClientSecret, c.UseManagedIdentity, c.UseWorkloadIdentity = Secret(secret), false, false
	}
	if use := get("USE_MSI"); use != "" {
		b, err := strconv.ParseBool(strings.ToLower(use))
		if err != nil {
			return errors.New("environment variable USE_MSI is neither true nor false; set it to one of them")
		}
		c.UseManagedIdentity = b
	}
	// The webhook of workload identity sets these variables, only in pods that are labelled for it.
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

// OwnIdentities returns UserAssignedIdentityID, if any. MIC must never detach this identity, because MIC itself or the
// kubelet uses it.
func (c Config) OwnIdentities() []string {
	if c.UserAssignedIdentityID == "" {
		return nil
	}
	return []string{c.UserAssignedIdentityID}
}

// withoutMSI returns "" for "msi", which AKS writes if the cluster has a managed identity and no service principal.
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

// parse reads JSON, or YAML, which AAD Pod Identity also accepted. Errors of parsers quote the input, which may contain
// a secret, so the error here contains at most the line, or the field and its type. The caller puts the name of the
// file before the error.
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
			return errors.New("is not a JSON object")
		}
		return fmt.Errorf("has a value of the wrong type in the field %q, which must be a %s", mistyped.Field, mistyped.Type.Kind())
	}
	var flaw *json.SyntaxError
	if errors.As(json.Unmarshal(text, new(any)), &flaw) && bytes.HasPrefix(bytes.TrimSpace(text), []byte("{")) {
		return fmt.Errorf("has a JSON syntax error in line %d", 1+bytes.Count(text[:min(int(flaw.Offset), len(text))], []byte("\n")))
	}
	return errors.New("cannot be parsed as JSON or YAML")
}
