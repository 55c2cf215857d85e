-- How the run was made: its stages, how long they took, and what they left on disk.
--
-- Grain:   one row per artefact that the run was made from, in the order of the stages, the run itself last.
-- Reads:   stg_stages
-- Units:   stage is the kind of the artefact: tokens, activations, saes (the trained autoencoder) or features (the
--          values). n_bytes is the size on disk of what readers see. written is the time (UTC) of the last publication.
--          seconds is the time the stage took, as far as the stage recorded it. What no record says is null.
-- Ask it:  which stage takes most of the disk?
create or replace view stages as
select stage, artefact, n_bytes, seconds, written, host from stg_stages;
