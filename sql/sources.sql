-- The files of one run as views. This is the only file of the folder that names paths.
--
-- Grain:   as stored; one view for each table of the disk contract (data/README.md).
-- Reads:   the explicit Parquet files of one published generation, never a glob.
-- Units:   as stored, but tokens of forgotten and replaced documents are padding here and their documents are left out,
--          as compaction will write them. low and high say which features, or tokens, a file may hold. A question about
--          one feature that also asks for `feature between low and high` opens no other file.
-- Ask it:  nothing; everything else reads these views.
--
-- A question may have a parameter `source`, `role`, `annotation` or `class`, which DuckDB takes for a column of that
-- name, even inside a view. Views and macros that questions read therefore name the table in front of these columns.
--
-- saeflow replaces each `$$name` below by a read_parquet of those files, or by an empty table if an earlier saeflow
-- wrote none. `saeflow sql --script` prints this file filled in, followed by the rest of the folder, to be used in the
-- duckdb shell by hand.
create or replace view src_tokens as
select * from $tokens;

create or replace view src_vocab_blocks as
select block_id, first_token_id, n_tokens, vocab_ids from $vocab_blocks;

create or replace view src_shape as
select
    $context_length::bigint as context_length,
    $n_features::bigint     as n_features,
    $has_marginals::boolean as has_marginals,
    $has_sample::boolean    as has_sample,
    $has_offsets::boolean   as has_offsets;

create or replace macro src_is_encoded(token, entry) as
($encoded);

create or replace macro src_vocab_id(token) as
($vocab_id);

create or replace macro src_is_signed() as
($is_signed::boolean);

create or replace macro src_skip_reason(token, entry) as
($skip_reason);

create or replace view src_left_out as
select token_id, vocab_id, length from $left_out;

create or replace view src_documents as
select * from $documents;

create or replace view src_hidden_values as
select first_token_id, last_token_id from $hidden_values;

create or replace view src_hidden as
select unnest($hidden::bigint[]) as document_id;

create or replace view src_vocab as
select * from $vocab;

create or replace view src_feature_major as
select feature_id, token_id, value, low, high, filename from $feature_major;

create or replace view src_token_major as
select token_id, feature_id, value, low, high, filename from $token_major;

create or replace macro src_values_at(tokens) as table
$values_at;

create or replace view src_parts as
select part, folder, first_token_id, end_token_id from $parts;

create or replace view src_feature_stats as
select * from $feature_stats;

create or replace view src_feature_histogram as
select feature_id, bin, n_tokens, filename from $feature_histogram;

create or replace view src_feature_sources as
select feature_id, stored.source, is_rest, n_tokens, sum_value, sum_squares, filename
from $feature_sources as stored;

create or replace view src_feature_positions as
select feature_id, band, n_tokens, sum_value from $feature_positions;

create or replace view src_feature_vocab as
select feature_id, vocab_id, n_tokens, sum_value from $feature_vocab;

create or replace view src_coactivation as
select feature_id, other_id, n_both from $coactivation;

create or replace view src_encoded_tokens as
select stored.source, is_rest, band, n_tokens, filename from $encoded_tokens as stored;

create or replace view src_sample as
select feature_id, token_id, value from $sample;

create or replace view src_sample_documents as
select document_id, first_token_id, n_tokens from $sample_documents;

create or replace view src_similar as
select feature_id, other_id, cosine from $similar;

create or replace view src_logits as
select feature_id, vocab_id, logit from $logits;

create or replace view src_labels as
select feature_id, label, stored.source, score from $labels as stored;

create or replace view src_feature_classes as
select
    stored.annotation, stored.class, feature_id, n_fires, n_both, auroc, auroc_low, auroc_high, average_precision, f1,
    f1_low, f1_high, threshold, precision, recall, lift, correlation, t, p, q
from $feature_classes as stored;

create or replace view src_class_sizes as
select stored.annotation, stored.class, n_tokens, n_documents, share from $class_sizes as stored;

create or replace view src_sparse_probes as
select stored.annotation, stored.class, basis, k, auroc, f1, n_train, n_test, dimensions from $sparse_probes as stored;

create or replace view src_annotations as
select stored.annotation, stored.class, document_id, first_token_id, last_token_id from $annotations as stored;

create or replace view src_rules as
select feature_id, rule, kind, "precision", recall, score from $rules;

create or replace view src_effects as
select * from $effects;

create or replace view src_direct_effects as
select effect, feature_id, vocab_id, logit from $direct_effects;

create or replace view src_explanation_scores as
select feature_id, stored.source, model, method, stratum, score, low, high, n, n_unusable
from $explanation_scores as stored;

create or replace view src_explanation_mistakes as
select feature_id, stored.source, model, method, stratum, token_id, asked, answered
from $explanation_mistakes as stored;

create or replace view src_runs as
select unnest($runs, recursive := true);

create or replace view src_stages as
select unnest($stages, recursive := true);

create or replace view src_settings as
select unnest($settings, recursive := true);

create or replace view src_training_log as
select step, batch_rows, lr, loss, variance_unexplained, l0, dead, auxiliary_loss, sparsity_loss, k, sparsity_factor,
    grad_norm
from $training_log;
