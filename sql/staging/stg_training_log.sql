-- The log of the autoencoder's training.
--
-- Grain:   one row per logged step.
-- Reads:   src_training_log
-- Units:   see the question training_curve.
-- Ask it:  which steps were logged?
create or replace view stg_training_log as
select * from src_training_log;
